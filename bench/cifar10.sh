#!/usr/bin/env bash
# ThresholdNet v1 on CIFAR-10 on this machine, one run a recipe; the modern run is killed (kill -9) in epoch 3 and resumed.
#
#   bench/cifar10.sh ROOT RESULTS [modern] [released]
#
# ROOT: folder of cifar-10-batches-py; RESULTS: where log, curve and figures go. Both recipes are 7 epochs: about
# 25 minutes on 2 idle cores, several times that beside other work.
set -euo pipefail

command=${THRESHOLDNET:-thresholdnet}

say() { echo "\$ thresholdnet $*" | sed -e "s#$work/#runs/#g" -e "s#$root#ROOT#g"; }

modern() {
  local options=("${common[@]}" --recipe modern --epochs 5 --save-every 100 --out "$work/modern") pid
  say "${options[@]}"
  "$command" "${options[@]}" &
  pid=$!
  until grep -q '^epoch 2/5' "$work/modern.log"; do sleep 1; kill -0 $pid; done
  sleep 60
  kill -9 $pid
  wait $pid || true
  echo "[kill -9 in epoch 3]"
  say train --out "$work/modern" --resume --no-progress
  "$command" train --out "$work/modern" --resume --no-progress
}

released() {
  local options=("${common[@]}" --recipe released --epochs 2 --out "$work/released")
  say "${options[@]}"
  "$command" "${options[@]}"
}

keep() { # NAME: the run's log, curve and figures, without machine paths and without pictures of the data
  mkdir -p "$results/$1"
  sed -i -e "s#$work/#runs/#g" -e '/Killed/d' "$work/$1.log"
  cp "$work/$1.log" "$results/$1/log.txt"
  cp "$work/$1/"{curve,confusion}.png "$work/$1/metrics.csv" "$results/$1/"
  sed -e "s#$work/#runs/#g" -e "s#$root#ROOT#g" "$work/$1/result.json" >"$results/$1/result.json"
}

main() { # in one function, so that bash has read it all before it starts
  root=$1 results=$2
  shift 2
  mkdir -p "$results"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  common=(train --model thresholdnet_v1 --data cifar10 --root "$root" --seed 0 --no-progress)
  for recipe in "${@:-modern released}"; do
    for name in $recipe; do
      "$name" >"$work/$name.log" 2>&1 || { cat "$work/$name.log" >&2; exit 1; }
      keep "$name"
    done
  done
}

main "$@"
