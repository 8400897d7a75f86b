"""Whole searches on two busy cores: one thread, a cache of operator times that is thrown away."""

import warnings

import pytest
import torch
from tasks import blobs, export_faster, trained_net


@pytest.fixture(autouse=True, scope="session")
def lean(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_faster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("autocompress.forecast.WHOLE_NETWORKS", 2)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data():
    return blobs()


@pytest.fixture(scope="session")
def net(data):
    return trained_net(data)
