"""Several stages, several forms of an image: which one is judged."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from evaluation_cases import labelled, purified
from torch import nn

from coupfast.evaluation import Attack, Cost, Ledger, Result, Suite, evaluate
from coupfast.evaluation.attacks import PGD
from coupfast.evaluation.starts import start_of


class Fails(nn.Module):
    """Misclassifies an image with the probability that its first pixel is."""

    def forward(self, x):
        fails = torch.rand(len(x)) < x[:, 0, 0, 0]
        return torch.stack([1.0 - fails.float(), fails.float()], dim=1)


@dataclasses.dataclass(frozen=True)
class Says(Attack):
    """Brings the first pixel to a value, tells what share of draws it saw fail there, and returns the image as it came."""

    value: float = 0.0
    failed: float = 0.0
    loss: float = 0.0

    def run(self, defense, x, y, *, seed):
        x_adv = x.clone()
        x_adv[:, 0, 0, 0] = self.value
        loss, share = (torch.full((len(x),), value) for value in (self.loss, self.failed))
        return Result(x, (0,), x_adv, loss, share)

    def cost(self):
        return Cost(0, 0)


@dataclasses.dataclass(frozen=True)
class Returns(Says):
    """Tells nothing, and returns what it made."""

    def run(self, defense, x, y, *, seed):
        return Result(super().run(defense, x, y, seed=seed).strongest)


def suite(*attacks):
    return Suite("forms", lambda norm, eps: {f"stage-{number}": attack for number, attack in enumerate(attacks)})


def judged(folder, *attacks, count=3, draws=40, **options):
    x, y = torch.zeros(count, 3, 4, 4), torch.zeros(count, dtype=torch.int64)
    x[:, 1] = torch.linspace(0.1, 0.9, count).view(-1, 1, 1)  # no two are equal
    return evaluate(Fails().eval(), x, y, attack=suite(*attacks), draws=draws, paths=2, shard=2, out=folder, **options)


@pytest.mark.parametrize("said", [(0.5, 0.9), (0.9, 0.5)])
@pytest.mark.parametrize("values", [(0.75, 0.25), (0.25, 0.75)])
def test_the_form_that_fails_most_on_equal_fresh_draws_is_judged(tmp_path, said, values):
    """Whatever the stages say of it, whose luckiest point seems better than it is."""
    with judged(tmp_path / "run", *map(Says, values, said)) as found:
        assert found.x_adv[:, 0, 0, 0].tolist() == [0.75] * 3
        failing = (found.verdicts["attacked"].logits.argmax(axis=2) == 1).mean()
        assert abs(failing - 0.75) < 0.25 and found.verdicts["attacked"].official.all()
        records = found.ledger.done()
        arrays = found.ledger.arrays(records["judge-00000"])
        assert arrays["form"].tolist() == [values.index(0.75)] * 2
        assert arrays["attacked_images"][:, 0, 0, 0].tolist() == [0.75] * 2
        # 40 draws of two forms, of clean and of attacked images; two images' ways, each by what comes out alone.
        assert sum(records[f"judge-{i:05d}"].forward_images for i in (0, 1)) == 3 * 40 * 4


def test_draws_that_choose_judge_nothing(tmp_path):
    """The same form is judged by the same draws, whatever it was chosen from."""
    with judged(tmp_path / "alone", Says(0.5, 0.1)) as alone, judged(tmp_path / "two", Says(0.5, 0.1), Says(0.1, 0.9)) as two:
        np.testing.assert_array_equal(alone.verdicts["attacked"].logits, two.verdicts["attacked"].logits)
        assert "form" not in alone.ledger.arrays(alone.ledger.done()["judge-00000"])


def test_equal_forms_are_one_and_ask_nothing(tmp_path):
    with judged(tmp_path / "run", Says(0.5, 0.1), Says(0.5, 0.9), draws=4) as found:
        assert {len(forms) for forms in found.ledger.forms(range(3)).values()} == {1}
        records = found.ledger.done()
    assert sum(records[f"judge-{i:05d}"].forward_images for i in (0, 1)) == 3 * 4 * 2


def test_an_image_that_an_attack_did_not_begin_is_no_form_of_it(tmp_path):
    """As of AutoAttack's, which tell so by a loss below all others."""
    with judged(tmp_path / "run", Says(0.3, 0.1), Says(0.0, 0.9, -math.inf), draws=4) as found:
        assert {len(forms) for forms in found.ledger.forms(range(3)).values()} == {1}
        assert found.verdicts["attacked"].unchanged == 0
    with judged(tmp_path / "none", Says(0.0, 0.9, -math.inf), draws=4) as found:
        assert found.verdicts["attacked"].unchanged == 3


def test_an_attack_that_tells_nothing_is_one_of_them(tmp_path):
    with judged(tmp_path / "run", Says(0.75, 0.1), Returns(0.25)) as found:
        standing = np.array([image for image in found.ledger.done()["stage-0-00000"].standing])
        assert len(standing) == 2 and found.x_adv[:, 0, 0, 0].tolist() == [0.75] * 3


def test_who_knows_the_judges_draws_chooses_by_them():
    """Of two forms the one that fails more of these very draws: no worse than either alone."""
    attacks = [PGD("Linf", 1 / 255, iterations=1, eot_iter=1, losses=loss, dw_box=True) for loss in ("ce", "dlr")]
    x, y = labelled(3)

    def right(*attacks):
        with evaluate(purified("cpu"), x, y, attack=suite(*attacks), draws=5, paths=0) as found:
            return (found.verdicts["attacked"].logits.argmax(axis=2) == y.numpy()).mean(axis=0)

    assert (right(*attacks) <= np.minimum(right(attacks[0]), right(attacks[1]))).all()


def test_stopped_while_it_chooses_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    attacks = (Says(0.75, 0.1), Says(0.25, 0.9))
    with judged(tmp_path / "whole", *attacks, draws=4) as whole:
        wanted = whole.fingerprint
    calls, forward = itertools.count(), Fails.forward

    def strike(self, x):
        # Only the judge sees an attacked image: four draws of one form, four of the other, and then those that judge.
        if x[:, 0, 0, 0].any() and next(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(Fails, "forward", strike)
    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path / "run", *attacks, draws=4)
    with Ledger(tmp_path / "run", read_only=True) as ledger:
        assert {record.unit.stage for record in ledger.done().values()} >= {"clean", "stage-0", "stage-1"}
    monkeypatch.setattr(Fails, "forward", forward)
    with judged(tmp_path / "run", *attacks, draws=4, resume=True) as found:
        assert found.fingerprint == wanted


def test_a_run_that_begins_there_begins_at_what_was_judged(tmp_path):
    with judged(tmp_path / "run", Says(0.75, 0.1), Says(0.25, 0.9)) as found:
        x = found.x_adv.clone()
    x[:, 0, 0, 0] = 0.0
    start = start_of(tmp_path / "run", x, torch.zeros(3, dtype=torch.int64))
    assert start.x[:, 0, 0, 0].tolist() == [0.75] * 3
