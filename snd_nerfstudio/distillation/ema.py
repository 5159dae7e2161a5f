"""The teacher: an exponential moving average of what the student trains, and nothing more."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class EMATeacher(nn.Module):
    """Shadow values of a module's trainable parameters; the frozen rest is the student's own.

    ``theta_teacher <- m theta_teacher + (1 - m) theta_student`` (paper section 3.5). LoRA factors are averaged one by
    one, not their product, as the released code does.

    Args:
        student: its trainable parameters are copied.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        parameters = dict(student.named_parameters())
        for name in self._names:
            # a buffer's name cannot hold dots
            self.register_buffer(_buffer_name(name), parameters[name].detach().clone())

    def values(self, prefix: str = "") -> dict[str, Tensor]:
        """Shadow values by parameter name, of the submodule ``prefix`` only if one is given (and named within it)."""
        start = f"{prefix}." if prefix else ""
        return {
            name[len(start) :]: self.get_buffer(_buffer_name(name)) for name in self._names if name.startswith(start)
        }

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move the shadow towards the student.

        Raises:
            ValueError: the momentum is not in [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"EMA momentum {momentum} is not in [0, 1]")
        parameters = dict(student.named_parameters())
        shadow = [self.get_buffer(_buffer_name(name)) for name in self._names]
        current = [parameters[name].detach() for name in self._names]
        torch._foreach_lerp_(shadow, current, 1 - momentum)

    @torch.no_grad()
    def call(
        self, student: nn.Module, submodule: str, inputs: Tensor, dropout: bool = False, method: str = "forward"
    ) -> Any:
        """Run one of the student's submodules with the teacher's values in place of the student's.

        Args:
            student: the module whose parameters are averaged.
            submodule: name of its child to run.
            inputs: of the child.
            dropout: leave dropout on (the released code forgot to switch it off); off otherwise.
            method: which of its methods.
        """
        return call_with(student.get_submodule(submodule), self.values(submodule), inputs, dropout, method)


@torch.no_grad()
def call_with(
    module: nn.Module, values: Mapping[str, Tensor], inputs: Tensor, dropout: bool = False, method: str = "forward"
) -> Any:
    """Run a module with other values in place of some of its parameters, and leave it as it was.

    Args:
        module: to run.
        values: of some of its parameters, by name.
        inputs: of the module.
        dropout: leave dropout on; off otherwise.
        method: which of its methods.
    """
    swapped = {f"module.{name}": value for name, value in values.items()}
    with _uninterrupted(), _mode(module, training=dropout):
        return functional_call(_Method(module, method), swapped, (inputs,))


class _Method(nn.Module):
    """A method as a module, because parameters can only be swapped for a call of a module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, inputs: Tensor) -> Any:
        return getattr(self.module, self.method)(inputs)


def _buffer_name(parameter: str) -> str:
    return parameter.replace(".", "/")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep a trace function from raising in between: what is swapped in must be swapped out again.

    Nerfstudio's viewer abandons a render by an exception from such a function, between any two lines of Python. Raised
    while parameters are restored, it would leave the teacher's values in the student for good.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Switch a module to train or eval mode for a while, and every submodule back to what it was."""
    before = [(child, child.training) for child in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for child, was_training in before:
            child.training = was_training
