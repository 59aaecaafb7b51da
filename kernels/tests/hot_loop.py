"""Find the innermost loop of a kernel in the disassembly of the installed library."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_SYMBOL = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
_CODE = re.compile(r"^\s*(?P<at>[0-9a-f]+):\s+(?P<text>\S.*)$")
_JUMP = re.compile(r"^j\w+\s+(?P<to>[0-9a-f]+)\b")


def functions(library: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction, by demangled name."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", "-w", str(library)]
    found: dict[str, list[tuple[int, str]]] = {}
    body: list[tuple[int, str]] = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if symbol := _SYMBOL.match(line):
            body = found.setdefault(symbol["name"], [])
        elif code := _CODE.match(line):
            body.append((int(code["at"], 16), code["text"]))
    return found


def hot_loop(body: list[tuple[int, str]], product: str) -> list[str]:
    """The smallest loop that holds every ``product`` instruction of the function, its backward jump included."""
    positions = {address: i for i, (address, _) in enumerate(body)}
    products = [i for i, (_, text) in enumerate(body) if text.startswith(product)]
    loops = []
    for i, (address, text) in enumerate(body):
        jump = _JUMP.match(text)
        if jump and (to := int(jump["to"], 16)) < address and to in positions:
            inside = [p for p in products if positions[to] <= p <= i]
            loops.append((-len(inside), i - positions[to], positions[to], i))
    if not loops:
        return []
    _, _, begin, end = min(loops)
    return [text for _, text in body[begin : end + 1]]
