"""Calls of library functions in processes of their own, some of which end badly."""

import builtins
import os
import time

import pytest

from llm_jax.data.children import ChildError, Children


def test_results_come_in_the_order_of_the_calls():
    with Children(builtins.divmod, 2) as children:
        calls = [(i, 7) for i in range(40)]
        assert [call.result() for call in children.map(calls)] == [divmod(*call) for call in calls]
        assert list(children.map([])) == []


def test_what_a_function_raises_is_raised_and_its_process_goes_on():
    with Children(os.readlink, 1) as children:
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="nowhere"):
                children.call("/nowhere")


def test_a_process_that_dies_costs_one_call():
    with Children(builtins.eval, 1) as children:
        calls = list(children.map([("1 + 1",), ("__import__('os')._exit(3)",), ("2 + 2",)]))
    assert (calls[0].result(), calls[2].result()) == (2, 4)
    error = calls[1].exception()
    assert isinstance(error, ChildError) and not error.late and str(error) == "a process ended with status 3"


def test_processor_time_and_memory_are_limited():
    with Children(builtins.pow, 1, seconds=0.2) as children:
        with pytest.raises(ChildError) as error:
            children.call(3, 10**9)
        assert error.value.late and children.call(2, 3) == 8
    with Children(time.sleep, 1, seconds=0.2) as children:
        assert children.call(0.5) is None  # a wait is not work
    with Children(builtins.bytearray, 1, memory_bytes=1 << 28) as children:
        with pytest.raises(MemoryError):
            children.call(1 << 30)
        assert len(children.call(1 << 10)) == 1 << 10


def test_what_a_function_prints_is_no_answer(capfd):
    with Children(builtins.print, 1) as children:
        assert children.call("words") is None
    assert capfd.readouterr().err == "words\n"
