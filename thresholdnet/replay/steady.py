"""Calls of prepacked blocks: what replays one is known as long as no tensor of the block was written or replaced.

A block has hundreds of tensors, and forms made of each of its weights. To ask for all of them takes longer than a small
image; to see that none has changed does not.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..stamps import Stamp, stamp_of
from .recording import Recording

MOST = 256  # calls kept, the last used ones: of each block one for every kind of input


class _Steady(NamedTuple):
    stamp: Stamp  # of the block's tensors
    recording: Recording
    forms: dict[int, weakref.ref[Tensor]]  # see `Recording.forms`; what lets go of them is `packing`


_known: OrderedDict[Hashable, _Steady] = OrderedDict()
_lock = threading.Lock()


def find(key: Hashable, tensors: Sequence[Tensor]) -> tuple[Recording, dict[int, Tensor]] | None:
    """What replays the call of this key on these tensors of its block, and the forms that it reads.

    None where none was kept, or a tensor is not what it was by then, or a form is gone.
    """
    with _lock:
        found = _known.get(key)
        if found is None:
            return None
        _known.move_to_end(key)
    if not found.stamp.holds(tensors):
        return None
    forms = {number: tensor for number, form in found.forms.items() if (tensor := form()) is not None}
    return (found.recording, forms) if len(forms) == len(found.forms) else None


def keep(key: Hashable, tensors: Sequence[Tensor], recording: Recording, forms: dict[int, Tensor]) -> None:
    """Note a call that was replayed with these forms, but where its tensors have no stamp."""
    stamp = stamp_of(tensors)
    if stamp is None:
        return
    made = _Steady(stamp, recording, {number: weakref.ref(tensor) for number, tensor in forms.items()})
    with _lock:
        _known[key] = made
        if len(_known) > MOST:
            _known.popitem(last=False)


def forget() -> None:
    """Let go of all."""
    with _lock:
        _known.clear()
