"""What every test shares: ``data`` tests are skipped, with the reason, where the data folder is absent."""

from __future__ import annotations

import pytest

from bitsmith.zoo.data import data_root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if data_root() is None:
        skip = pytest.mark.skip(reason="no data folder: set BITSMITH_DATA (default ../shared/data)")
        for item in items:
            if item.get_closest_marker("data") is not None:
                item.add_marker(skip)
