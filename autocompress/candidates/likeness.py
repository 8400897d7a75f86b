"""What a policy is worth before anything is trained: how much its student, reconstructed and rounded to its bits, answers like the teacher.

The search appraises by it. Each policy is built and reconstructed by itself, with fewer inputs than before training (some seconds),
rather than assembled from a database of layers that were reconstructed alone, as SPDY does (Frantar & Alistarh 2022, arXiv 2201.13096,
section 3.3): a layer that knows what the layers before it have lost makes up for a part of it. `benchmarks/rungs.py` compares likeness
with what training makes of the same students.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from autocompress.batch import call_network, joined
from autocompress.compress.memory import bounded_memory
from autocompress.compress.outputs import relative_errors
from autocompress.compress.quantize import CALIBRATION_BATCH, calibrate, fake_quantize
from autocompress.compress.reconstruct import TeacherActivations, examples_for, reconstruct
from autocompress.compress.student import build_student
from autocompress.data import sample
from autocompress.errors import PolicyFailure
from autocompress.policy import Policy
from autocompress.setup.setting import Setting
from autocompress.system.failures import policy_errors

EXAMPLES = 128
"""Inputs that a student is reconstructed on, at most: more take longer, and flatter small students (`benchmarks/rungs.py`)."""
HELD_OUT = 512
"""Validation inputs that student and teacher answer, at most."""


class Likeness:
    """Likeness to the teacher, from 0 to 1, of the students that are made of it."""

    def __init__(self, setting: Setting) -> None:
        graph, data = setting.graphs[None], setting.data
        n = min(EXAMPLES, setting.calibration_inputs, examples_for(graph))
        held_out = min(HELD_OUT, 4 * n, setting.most_answers)
        self.failures: list[str] = []
        """Why students were given 0 that could not be made or asked."""
        self._setting, self._activations = setting, TeacherActivations(graph, joined([*data.calibration_batches(n, n)]))
        self._held_out = [inputs for inputs, _ in data.batches(sample(data.val, held_out), setting.batch_size)]
        self.wanted = self.answers(graph.module)

    @torch.no_grad()
    def __call__(self, policy: Policy) -> float:
        """0 where student and teacher have nothing in common, or the student cannot be made; 1 where they answer alike.

        Of classifiers the probability that both give to the same classes (1 - their total variation distance), which unlike a divergence is
        bounded: one confident error in a thousand answers does not decide. Of other networks 1 / (1 + squared difference / variance), on
        average of all outputs.
        """
        try:
            # out of memory, equations without a solution, whatever a module of the user's raises
            with policy_errors(self._setting.log), bounded_memory():
                answers = self.answers(self.student(policy))
        except PolicyFailure as error:
            self.failures.append(error.message)
            return 0.0
        if self._setting.data.decides:
            shared = torch.minimum(answers.softmax(1), self.wanted.softmax(1)).sum(1).mean()
        else:
            shared = (1 / (1 + relative_errors(answers, self.wanted))).mean()
        return float(torch.nan_to_num(shared))

    @torch.no_grad()
    def student(self, policy: Policy) -> fx.GraphModule:
        """The policy's student as it is compared: reconstructed, and rounded to its bits."""
        graph = self._setting.graph_of(policy)
        student = build_student(graph, policy)
        if self._setting.changes_shape(policy):
            reconstruct(student, self._activations, policy)
        if policy.quant.rounds:
            student = fake_quantize(student.eval(), policy.quant)
            calibrate(student, self._activations.inputs.split(CALIBRATION_BATCH))
        return student.eval()

    @torch.no_grad()
    def answers(self, network: fx.GraphModule) -> Tensor:
        """What a network makes of the held-out inputs."""
        return torch.cat([call_network(network, inputs).float() for inputs in self._held_out])
