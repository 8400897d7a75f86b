"""A search in a process of its own, to be killed, interrupted and starved: `python searching.py RUN [options of autocompress search]`.

The command line as it is, but on a device whose truth is arithmetic. Prints `outcome ID` for each outcome that is recorded.
"""

from __future__ import annotations

import os
import resource
import sys

import torch
from tasks import SLOW_CALLS, blobs, trained_net

from autocompress import cli, schedule, session
from autocompress.candidates import ahead
from autocompress.controller.pace import Pace
from autocompress.study.journal import Journal
from autocompress.testing.devices import FakeDevice


def main() -> int:
    torch.set_num_threads(1)
    data = blobs()
    net, run, record = trained_net(data), session.run_search, Journal.record
    full_after = int(os.environ.get("FULL_AFTER", "1000"))
    recorded = []

    def run_here(*arguments, **options):
        return run(*arguments, model=net, data=data, device=FakeDevice(SLOW_CALLS), **options)

    def tell(journal, outcome):
        if len(recorded) == full_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        record(journal, outcome)
        recorded.append(outcome.id)
        print("outcome", outcome.id, file=sys.__stdout__, flush=True)  # a search lets nobody else write there

    session.run_search, Journal.record = run_here, tell
    Pace.overhead = lambda self: 0.2
    schedule.APPRAISAL_SHARE, schedule.SHORT_SHARE, schedule.SHORT_RUNS, ahead.WHOLE_NETWORKS = 0.01, 0.8, 60, 2
    schedule.PROFILING_SHARE, schedule.POOL_SHARE = 0.02, 0.005
    own = ["search", "--model", "own:net", "--data", "own:blobs", "--search-time", "180s", "--out", sys.argv[1], *sys.argv[2:]]
    return cli.main(own)


if __name__ == "__main__":
    raise SystemExit(main())
