"""Microbatches of a supervised run that has lost hosts, and what is said of them."""

import types

import pytest

from llm_jax.config import MeshConfig
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import supervised


@pytest.mark.parametrize("is_stochastic", [True, False])
def test_more_microbatches_are_said_to_change_what_is_drawn_at_random(is_stochastic, monkeypatch, capsys):
    mesh = mesh_lib.build(MeshConfig())
    monkeypatch.setattr(supervised, "worker", lambda: types.SimpleNamespace(shrunk=2.0))
    assert supervised.microbatches(64, 2, mesh, is_stochastic) == 4
    printed = capsys.readouterr().out
    assert printed.startswith("4 microbatches instead of 2, on 1/2 of the hosts")
    assert ("dropout and noise draw other numbers" in printed) == is_stochastic


def test_with_all_hosts_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(supervised, "worker", lambda: types.SimpleNamespace(shrunk=1))
    assert supervised.microbatches(64, 2, mesh_lib.build(MeshConfig()), True) == 2
    assert not capsys.readouterr().out
