"""The operation ``bitsmith::WinogradConv`` for OpenVINO, as a file that ``Core.add_extension`` takes."""

from __future__ import annotations

from pathlib import Path

from ._library import folders

_PREFIX = "libbitsmith_openvino_"


def versions() -> dict[str, Path]:
    """The versions of OpenVINO that an extension was built for, and its file."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob(f"{_PREFIX}*.so")):
            found.setdefault(path.stem.removeprefix(_PREFIX).replace("_", "."), path)
    return found


def extension(version: str) -> Path:
    """The file for this version of OpenVINO, such as ``"2026.4.1"`` (what follows the third number does not matter).

    An extension is bound to the version it was built with. Raises ``ImportError`` where there is none for this one.
    """
    asked = ".".join(version.partition("-")[0].split(".")[:3])
    built = versions()
    if asked not in built:
        known = f"built for {', '.join(built)}" if built else "built without OpenVINO"
        raise ImportError(
            f"bitsmith_kernels has no extension for OpenVINO {asked} ({known}); with that OpenVINO and "
            "scikit-build-core installed, build it with: pip install --no-build-isolation --force-reinstall --no-deps "
            "./kernels"
        )
    return built[asked]
