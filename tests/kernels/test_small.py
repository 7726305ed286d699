"""What compute-sanitizer runs on a GPU runs here too."""

from __future__ import annotations

import pytest

from tests.kernels.small import ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_small_cases_run(room: str) -> None:
    ROOMS[room]()
