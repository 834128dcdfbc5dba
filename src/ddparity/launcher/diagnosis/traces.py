"""Tracebacks for the end of the output: the user's frames, and a word on those of libraries between them."""

from __future__ import annotations

import re

from .stacks import Frame, is_users

_WHOLE = 10  # lines that are shown as they are
_FRAME = re.compile(r'(\s+)File "(.+)", line (\d+),? in (.+)')
_MARKS = re.compile(r"\s+[\^~]+\s*")
_INSTALLED = re.compile(r".*/(?:(?:site|dist)-packages|lib/python3\.\d+|(?=ddparity/))/?")


def shortened(trace: str) -> str:
    """A long traceback without the frames of libraries, also those that its message quotes; a short one as it is.

    Each run of such frames becomes one line, which tells where the last of them stood.
    """
    lines = trace.splitlines()
    if len(lines) <= _WHOLE:
        return trace
    kept: list[str] = []
    run: list[Frame] = []
    depth = -1  # the indentation of the frame whose source lines follow; -1: none
    for line in lines:
        found = _FRAME.fullmatch(line)
        if found is not None:
            depth = len(found[1])
            frame = Frame(found[2], int(found[3]), found[4])
            if not is_users(frame):
                run.append(frame)
                continue
        elif depth >= 0 and len(line) - len(line.lstrip()) > depth:
            if run or _MARKS.fullmatch(line):
                continue
        else:
            depth = -1
        if run:
            kept.append(_told(run))
            run = []
        kept.append(line)
    return "\n".join(kept)


def last_place(trace: str) -> Frame | None:
    """The innermost frame of the user's code; none where there is none."""
    found = (_FRAME.fullmatch(line) for line in trace.splitlines())
    frames = [Frame(one[2], int(one[3]), one[4]) for one in found if one is not None]
    return next((frame for frame in reversed(frames) if is_users(frame)), None)


def _told(run: list[Frame]) -> str:
    last = run[-1]
    number = f"{len(run)} frames, to" if len(run) > 1 else "1 frame,"
    return f"  … {number} {_INSTALLED.sub('', last.file)}:{last.line}, in {last.function}"
