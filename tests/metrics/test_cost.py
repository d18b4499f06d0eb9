"""Amounts add, peaks do not; money, FLOPs and time of a known piece of work."""

import time

import pytest

from raysyn.metrics.cost import Cost, cost_columns, gpu_energy_joules, measured


def test_amounts_add_and_peaks_take_the_larger() -> None:
    a = Cost(1, 2, 3, 4, 5.0, 600, 70, 8.0)
    total = a + Cost(10, 20, 30, 40, 50.0, 100, 90, 80.0)
    assert total == Cost(11, 22, 33, 44, 55.0, 600, 90, 88.0)
    assert (a + Cost()).energy_joules is None  # a part that no one measured


def test_money_at_the_configured_rates() -> None:
    assert Cost(cpu_seconds=7200, gpu_seconds=1800).usd(0.05, 2.0) == pytest.approx(0.1 + 1.0)


def test_columns_of_a_data_set() -> None:
    stages = {"fit": Cost(cpu_seconds=3600), "sample": Cost(cpu_seconds=1800, num_function_evals=9, energy_joules=2.0)}
    columns = cost_columns(stages, 1.0, 0.0)
    assert columns["cost/total_cpu_seconds"] == 5400
    assert columns["cost/usd"] == 1.5
    assert columns["cost/sample_energy_joules"] == 2.0
    assert "cost/total_energy_joules" not in columns
    assert "cost/fit_flops" not in columns
    with pytest.raises(ValueError, match="no stage"):
        cost_columns({}, 1, 1)


def test_measured_time_is_wall_and_cpu_apart() -> None:
    with measured() as cost:
        time.sleep(0.05)
    assert cost.wall_seconds >= 0.05 > cost.cpu_seconds
    assert (cost.gpu_seconds, cost.energy_joules) == (0, None)
    assert cost.peak_memory_mb > 1


def test_half_a_gpu_is_half_of_its_time_and_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100.0, 300.0])
    monkeypatch.setattr("raysyn.metrics.cost.gpu_energy_joules", lambda: next(readings))
    with measured(0.5) as cost:
        time.sleep(0.01)
    assert cost.gpu_seconds == pytest.approx(cost.wall_seconds / 2)
    assert cost.energy_joules == 100


def test_what_fails_has_cost_too() -> None:
    with pytest.raises(KeyError), measured() as cost:
        raise KeyError("x")
    assert cost.wall_seconds > 0


def test_energy_is_unknown_or_a_number() -> None:
    energy = gpu_energy_joules()
    assert energy is None or energy >= 0
