"""What holds for all tests."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub looks: no test needs a Hub

# A machine that does other work as well must not fail a law; and a run leaves nothing behind.
settings.register_profile(
    "laws", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", parent=settings.get_profile("laws"), max_examples=15)
settings.load_profile("laws")


def pytest_configure(config: pytest.Config) -> None:
    """Let a run without the slow tests try fewer examples of each law."""
    if "not slow" in config.getoption("markexpr", ""):
        settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and those of parallel tests would fight for cores."""
    import torch

    torch.set_num_threads(1)
