"""Whole searches: a cache of operator times that is thrown away, few networks to calibrate on, and little time to appraise."""

import pytest
from tasks import blobs, trained_net


@pytest.fixture(autouse=True, scope="session")
def lean(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("autocompress.forecast.WHOLE_NETWORKS", 2)
        patch.setattr("autocompress.schedule.APPRAISAL_SHARE", 0.03)
        yield


@pytest.fixture(scope="session")
def data():
    return blobs()


@pytest.fixture(scope="session")
def net(data):
    return trained_net(data)
