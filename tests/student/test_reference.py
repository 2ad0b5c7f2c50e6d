"""The reference policy: the base with adapters off, or weights that were frozen. Sharded: see `test_weights`."""

from __future__ import annotations

import pytest
import torch

from slmreason.student import Student
from slmreason.student.packing import collate
from tests.student.test_student import examples_for


def test_reference_of_lora_is_the_base_with_adapters_off(lora_student: Student, student: Student) -> None:
    batch = collate(examples_for(student), student.pad_token_id)
    with torch.no_grad():
        base = student.score(batch).log_probs
        policy = lora_student.score(batch).log_probs
        with lora_student.reference_policy.answering():
            reference = lora_student.score(batch).log_probs
    torch.testing.assert_close(reference, base, rtol=0, atol=0)
    assert (policy - base).abs().max() > 1e-3


def test_frozen_reference_stays_while_the_policy_moves(student: Student) -> None:
    batch = collate(examples_for(student), student.pad_token_id)
    before = student.score(batch).log_probs.detach()
    with pytest.raises(RuntimeError, match=r"reference_policy.freeze\(\)"), student.reference_policy.answering():
        pass
    student.reference_policy.freeze()
    with torch.no_grad():
        student.trained.parameters()[0].add_(0.1)
        with student.reference_policy.answering():
            reference = student.score(batch).log_probs
    torch.testing.assert_close(reference, before, rtol=0, atol=0)
    assert not torch.equal(student.score(batch).log_probs, before)
    assert not any("reference" in name for name in student.state_dict())


def test_what_is_frozen_stays_until_it_is_dropped(student: Student) -> None:
    batch = collate(examples_for(student), student.pad_token_id)
    found = []
    with torch.no_grad():
        for drop in (False, False, True):
            if drop:
                student.reference_policy.drop()
            student.reference_policy.freeze()
            student.trained.parameters()[0].add_(0.1)
            with student.reference_policy.answering():
                found.append(student.score(batch).log_probs)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert not torch.equal(found[2], found[0])
