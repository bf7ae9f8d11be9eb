#!/usr/bin/env bash
# ThresholdNet v1 on CIFAR-10, both recipes, on this machine; the modern run is killed (kill -9) in epoch 3 and resumed.
#
#   bench/cifar10.sh ROOT RESULTS     ROOT: folder of cifar-10-batches-py; RESULTS: where log, curve and figures go
#
# Takes 7 epochs: about 25 minutes on 2 cores.
set -euo pipefail
root=$1 results=$2 work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command=${THRESHOLDNET:-thresholdnet}
common=(train --model thresholdnet_v1 --data cifar10 --root "$root" --seed 0 --no-progress)
say() { echo "\$ thresholdnet $*" | sed -e "s#$work/#runs/#g" -e "s#$root#ROOT#g"; }

keep() { # NAME: the run's log, curve and figures, without machine paths
  mkdir -p "$results/$1"
  sed -i "s#$work/#runs/#g" "$work/$1.log"
  cp "$work/$1.log" "$results/$1/log.txt"
  cp "$work/$1/"{curve,confusion,predictions}.png "$work/$1/metrics.csv" "$results/$1/"
  sed -e "s#$work/#runs/#g" -e "s#$root#ROOT#g" "$work/$1/result.json" >"$results/$1/result.json"
}

modern=(--recipe modern --epochs 5 --save-every 100 --out "$work/modern")
log=$work/modern.log
{
  say "${common[@]}" "${modern[@]}"
  "$command" "${common[@]}" "${modern[@]}" &
  pid=$!
  until grep -q '^epoch 2/5' "$log"; do sleep 1; kill -0 $pid; done
  sleep 60
  kill -9 $pid
  wait $pid || true
  echo "[kill -9 in epoch 3]"
  say train --out "$work/modern" --resume --no-progress
  "$command" train --out "$work/modern" --resume --no-progress
} >"$log" 2>&1
keep modern

released=(--recipe released --epochs 2 --out "$work/released")
{
  say "${common[@]}" "${released[@]}"
  "$command" "${common[@]}" "${released[@]}"
} >"$work/released.log" 2>&1
keep released
