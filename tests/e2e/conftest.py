"""Whole searches: a cache of operator times that is thrown away, few networks to calibrate on, and little time to appraise."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from running import TASK
from tasks import SLOW_CALLS, blobs, trained_net

from autocompress.budget import Budget
from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.forecast import Forecast
from autocompress.candidates.pool import draw_pool
from autocompress.controller.findings import Findings
from autocompress.latency import FittedLatencyModel, OperatorTable
from autocompress.records import Score
from autocompress.schedule import Clock
from autocompress.search_space import find_suggest
from autocompress.setup.loading import load
from autocompress.study.database import open_journal
from autocompress.system.progress import SilentProgress
from autocompress.testing.devices import FakeDevice
from autocompress.trial.preparation import prepare


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True, scope="module")
def lean(own_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own_cache))
        patch.setattr("autocompress.candidates.ahead.WHOLE_NETWORKS", 2)
        patch.setattr("autocompress.schedule.APPRAISAL_SHARE", 0.03)
        patch.setattr("autocompress.schedule.PROFILING_SHARE", 0.03)
        patch.setattr("autocompress.schedule.POOL_SHARE", 0.01)
        yield


@pytest.fixture(scope="session")
def data():
    return blobs()


@pytest.fixture(scope="session")
def net(data):
    return trained_net(data)


@pytest.fixture(scope="module")
def forecast(net, data, tmp_path_factory):
    setting = prepare(TASK, tmp_path_factory.mktemp("controller") / "run", load(TASK, model=net, data=data, device=FakeDevice(SLOW_CALLS)))
    setting = replace(setting, baseline=replace(setting.baseline, val_score=Score(value=0.9)))
    suggest = find_suggest("default", setting.graphs[None], setting.device.profile)
    found = Forecast(setting, suggest, Budget(), FittedLatencyModel(OperatorTable()))
    measure_ahead(found, 2.0, 0, lambda *_: None)
    return found


@pytest.fixture(scope="module")
def pool(forecast):
    return draw_pool(forecast, 0, 1.5)


@pytest.fixture
def findings(forecast, tmp_path):
    journal = open_journal(tmp_path, TASK, resume=False)
    own = replace(
        forecast,
        model=copy.copy(forecast.model),
        networks=dict(forecast.networks),
        untrained=dict(forecast.untrained),
        _first_predictions=dict(forecast._first_predictions),
    )
    return Findings(TASK, tmp_path, journal, own, Clock.start(60.0), SilentProgress(), history=[])
