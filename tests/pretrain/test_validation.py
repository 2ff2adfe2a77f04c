"""Held-out subjects: who they are, that nothing is learned from them, and the best weights by them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretraining import config, sources

from isimed_index.encoders.networks import ValidNet
from isimed_index.errors import UsageError
from isimed_index.pretrain.forward import Forward
from isimed_index.pretrain.methods import build_method, outputs_of
from isimed_index.pretrain.processes import ALONE, Processes
from isimed_index.pretrain.sampler import Cohort
from isimed_index.pretrain.trainer import build_network, new_card
from isimed_index.pretrain.validation import Best, Validation, split

SUBJECTS = st.lists(st.sampled_from([f"sub-{n:02d}" for n in range(12)]), min_size=2, max_size=30)


@given(SUBJECTS.filter(lambda names: len(set(names)) > 1), st.floats(0.01, 0.99), st.integers(0, 99))
def test_no_subject_is_on_both_sides(subjects: list[str], share: float, seed: int) -> None:
    chosen, held = split(subjects, share, seed)
    assert sorted(chosen + held) == list(range(len(subjects)))
    of_chosen, of_held = {subjects[row] for row in chosen}, {subjects[row] for row in held}
    assert not of_chosen & of_held
    assert of_chosen
    assert of_held
    assert abs(len(of_held) - share * len(set(subjects))) <= 1


@given(SUBJECTS.filter(lambda names: len(set(names)) > 1), st.randoms())
def test_who_is_held_out_depends_on_names_and_seed_alone(subjects: list[str], order: object) -> None:
    shuffled = subjects.copy()
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    held = {subjects[row] for row in split(subjects, 0.3, 0)[1]}
    assert {shuffled[row] for row in split(shuffled, 0.3, 0)[1]} == held


def test_another_seed_holds_out_others() -> None:
    names = [f"sub-{n}" for n in range(20)]
    assert len({tuple(split(names, 0.2, seed)[1]) for seed in range(8)}) > 4


def test_nothing_is_held_out_unless_asked_for_and_somebody_is_left() -> None:
    assert split(["a", "a", "b"], 0.0, 0) == ([0, 1, 2], [])
    with pytest.raises(UsageError, match="two subjects") as refused:
        split(["a", "a"], 0.1, 0)
    assert "validation_share" in refused.value.next_step


def test_the_best_weights_are_copies_of_the_epoch_with_the_lowest_loss() -> None:
    best, weights = Best(), {"w": torch.zeros(2)}
    for epoch, loss in enumerate([3.0, 1.0, math.nan, 1.0, 2.0], 1):
        weights["w"] += 1
        best.consider(loss, epoch, weights)
    assert (best.loss, best.epoch, best.waited) == (1.0, 2, 3)
    assert best.weights["w"].tolist() == [2.0, 2.0]


def test_validation_leaves_the_network_as_it_was_and_judges_the_weights_it_is_given() -> None:
    torch.set_num_threads(1)
    setup = config(validation_share=0.3)
    card = new_card(setup, "a", "tiny")
    torch.manual_seed(0)
    network = build_network(card.factory, card.outputs, card.network).train()
    method = build_method(setup, network)
    forward = Forward(setup, network, method, torch.device("cpu"), ALONE)
    validation = Validation(setup, Cohort(sources(2), 2**30), forward)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    other = {name: tensor * 0 if name.startswith("heads") else tensor for name, tensor in before.items()}

    own = validation.figures(before)
    nothing = validation.figures(other)
    assert validation.figures(before) == own  # the same batches every time
    assert nothing["validation_rankme"] < own["validation_rankme"]
    assert nothing["validation_embedding_sd"] == 0.0
    assert nothing["validation_loss"] != own["validation_loss"]
    total = own["validation_distance"] + own["validation_coordinate"] + 0.3 * own["validation_descriptor"]
    assert own["validation_loss"] == pytest.approx(total, rel=1e-5)
    assert network.training
    assert method.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # batch-norm statistics, too


@pytest.mark.parametrize("held", [1, 2, 3])
def test_what_is_judged_does_not_depend_on_how_many_processes_judge_it(held: int) -> None:
    """Otherwise another epoch would be the best one where two processes train."""
    setup = config(batch_scans=4, validation_share=0.3)
    network = ValidNet(outputs_of(setup), width=2)
    method = build_method(setup, network)
    seen = [
        Validation(setup, Cohort(sources(held), 2**30), Forward(setup, network, method, torch.device("cpu"), processes))
        for processes in (ALONE, Processes(0, 2), Processes(1, 2))
    ]
    alone, first, second = (validation.config for validation in seen)
    assert alone == first == second
