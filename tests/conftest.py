import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import images


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: statistics and whole runs; skipped unless asked for by -m slow")
    config.addinivalue_line("markers", "slowest: too long for the checks of every commit; run by -m slowest")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(1)  # the tensors are small, and other processes use the cores too


def pytest_collection_modifyitems(config, items):
    for mark in ("slow", "slowest"):
        for item in items:
            if mark in item.keywords and mark not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"{mark}; run it by -m {mark}"))
    longest = "test_in_a_process_of_its_own"  # of test_triton_interpreter.py: started first, it shortens a parallel run
    items.sort(key=lambda item: item.name != longest)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """240 pictures in ten class folders; 20 are held out, and the other 220 make 6 steps of 32 images."""
    root = tmp_path_factory.mktemp("photos")
    for i, (picture, label) in enumerate(zip(*images.make_shapes(240, 0, 32), strict=True)):
        path = root / str(label.item()) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return root


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """CIFAR-10 as JPEG files, train/<class>/ and test/<class>/, at $CIFAR10_FOLDER."""
    folder = os.environ.get("CIFAR10_FOLDER")
    if not folder:
        pytest.skip("CIFAR10_FOLDER is not set to a folder of CIFAR-10 images")
    return Path(folder)
