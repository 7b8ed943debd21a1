"""A sleeping engine's identity, and sums of weights."""

import pytest
import torch

from vllm_xlayer.connector.disk import weights
from vllm_xlayer.connector.disk.weights import AcrossSleep, loaded_weights


class Worker:
    def __init__(self, *models):
        self.models = models

    def get_model(self):
        return self.models[0]

    def get_draft_model(self):
        return self.models[1] if len(self.models) > 1 else None


def model():
    made = torch.nn.Sequential(torch.nn.Embedding(700, 33, dtype=torch.bfloat16), torch.nn.Linear(5, 3))
    made.register_buffer("scale", torch.tensor(1.0))
    for i, tensor in enumerate((*made.parameters(), made.scale)):
        tensor.data.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % 251 + i)
    return made


def test_equal_weights_sum_up_to_the_same():
    assert loaded_weights(Worker(model())) == loaded_weights(Worker(model()))


CHANGES = {
    "one bit": lambda m: m[0].weight.data.view(torch.int16)[699, 32].bitwise_xor_(1),
    "first element": lambda m: m[0].weight.data[0, 0].add_(1),
    "two swapped": lambda m: m[0].weight.data[0, :2].copy_(m[0].weight.data[0, [1, 0]]),
    "two rows swapped": lambda m: m[0].weight.data.index_copy_(
        0, torch.tensor([1, 500]), m[0].weight.data[[500, 1]]
    ),
    "rows swapped": lambda m: m[0].weight.data.copy_(m[0].weight.data.flip(0)),
    "opposite changes": lambda m: (
        m[1].weight.data.view(torch.int32)[0, 0].add_(1),
        m[1].weight.data.view(torch.int32)[0, 1].sub_(1),
    ),
    "buffer": lambda m: m.scale.add_(1),
    "bias": lambda m: m[1].bias.data[2].add_(1),
    "shape": lambda m: setattr(m[1], "weight", torch.nn.Parameter(m[1].weight.data.view(5, 3))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change, monkeypatch):
    monkeypatch.setattr(weights, "PIECE_BYTES", 1 << 15)  # several
    changed = model()
    change(changed)
    assert loaded_weights(Worker(changed)) != loaded_weights(Worker(model()))


def test_a_draft_model_counts():
    changed = model()
    changed[1].bias.data[0] += 1
    assert loaded_weights(Worker(model(), model())) != loaded_weights(Worker(model(), changed))


def fail():
    raise RuntimeError("no workers")


def test_an_identity_returns_only_after_an_announced_reset_with_equal_weights():
    sleep, now = AcrossSleep(), ["a"]
    sleep.reset("of the files")
    assert sleep.ends() is None  # a plain reset
    sleep.begins(lambda: list(now))
    sleep.reset("of the files")
    assert sleep.ends() == "of the files" and sleep.ends() is None
    sleep.begins(lambda: list(now))
    sleep.reset("of the files")
    sleep.reset("an epoch")  # by the user, while it sleeps or after it
    assert sleep.ends() is None
    sleep.begins(lambda: list(now))
    sleep.reset("of the files")
    now[0] = "b"
    assert sleep.ends() is None
    now[0] = "a"  # too late: it has answered since
    assert sleep.ends() is None


def test_a_sleep_that_cannot_look_at_weights_is_a_reset():
    sleep = AcrossSleep()
    sleep.begins(fail)
    sleep.reset("of the files")
    assert sleep.ends() is None
    answers = iter([lambda: "a", fail])
    sleep.begins(lambda: next(answers)())
    sleep.reset("of the files")
    assert sleep.ends() is None
