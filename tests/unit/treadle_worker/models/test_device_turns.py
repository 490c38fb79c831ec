"""Turns at a device: shares, bounds, joins, deaths, on a clock of the test's own."""

from __future__ import annotations

import math
import random

import pytest
from turn_table import TurnTable


@pytest.mark.parametrize("task_share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("delay_s", [0.0, 0.0005])
def test_two_engines_get_their_shares(task_share, delay_s):
    table = TurnTable(task_share)
    decoder = table.engine("decoder", "generate", 0.02, delay_s)
    encoder = table.engine("encoder", "task", 0.07, delay_s)
    decoder.work()
    encoder.work()
    table.clock.run(200.0)
    used = decoder.seat.used_s, encoder.seat.used_s
    print(f"{used[1] / sum(used):.3f} of {task_share}; {table.device.num_handovers} hand-overs in 200 s")
    assert used[1] / sum(used) == pytest.approx(task_share, abs=0.003)
    assert encoder.computed_s / (encoder.computed_s + decoder.computed_s) == pytest.approx(
        task_share, abs=0.02
    )
    assert sum(used) == pytest.approx(200.0, abs=0.1)
    assert decoder.seat.waited_s == pytest.approx(used[1], abs=0.1)
    assert table.device.num_handovers > 200


def test_models_of_a_kind_divide_their_part_evenly():
    table = TurnTable(0.2)
    decoders = [table.engine(f"decoder {number}", "generate", 0.02 + 0.01 * number) for number in range(2)]
    encoders = [table.engine(f"encoder {number}", "task", 0.03) for number in range(3)]
    for engine in decoders + encoders:
        engine.work()
    table.clock.run(300.0)
    got = [engine.computed_s / 300 for engine in decoders + encoders]
    print([round(share, 3) for share in got])
    assert got == pytest.approx([0.4, 0.4, 0.2 / 3, 0.2 / 3, 0.2 / 3], abs=0.01)


def test_who_has_nothing_to_do_leaves_its_part_and_saves_none():
    table = TurnTable(0.5)
    decoder, encoder = table.engine("decoder", "generate", 0.02), table.engine("encoder", "task", 0.02)
    idle = table.engine("idle", "task", 0.02)
    decoder.work()
    table.clock.run(100.0)
    assert decoder.computed_s == pytest.approx(100.0, abs=0.1)
    assert decoder.seat.used_s == 0.0, "nobody else wanted it"
    encoder.work()
    table.clock.run(10.0)
    assert encoder.computed_s == pytest.approx(5.0, abs=0.2), "it was idle for 100 s, and gets half from now"
    encoder.work(False)
    table.clock.run(50.0)
    assert decoder.computed_s == pytest.approx(155.0, abs=0.5)
    encoder.work()
    table.clock.run(10.0)
    assert encoder.computed_s == pytest.approx(10.0, abs=0.3)
    assert idle.computed_s == 0.0


def test_alone_with_work_nothing_is_said():
    table = TurnTable(0.5)
    decoder, _ = table.engine("decoder", "generate", 0.02), table.engine("encoder", "task", 0.02)
    decoder.work()
    before = table.device.num_handovers
    table.clock.run(100.0)
    assert decoder.num_steps >= 4_990
    assert table.device.num_handovers == before == 0
    assert decoder.seat.waited_s == decoder.seat.used_s == 0.0


def test_a_turn_is_bounded_and_an_idle_device_is_free_at_once():
    table = TurnTable(0.5)
    decoder = table.engine("decoder", "generate", 0.03)
    encoder = table.engine("encoder", "task", 0.001)
    decoder.work()
    table.clock.run(7.0)
    began = table.clock.now
    encoder.work()
    while not encoder.num_steps:
        table.clock.run(0.001)
    print(f"the first step {1000 * (table.clock.now - began):.0f} ms after it was wanted")
    assert table.clock.now - began <= 0.03 + 0.003, "its quantum was over: only its step was waited for"
    gaps, last, steps = [], table.clock.now, decoder.num_steps
    while len(gaps) < 50:
        table.clock.run(0.001)
        if decoder.num_steps > steps:
            gaps.append(table.clock.now - last)
            last, steps = table.clock.now, decoder.num_steps
    print(f"the decoder's longest gap is {1000 * max(gaps):.0f} ms")
    assert max(gaps) <= 0.1, "a quantum, a step, and what its own last turn was too long"
    decoder.work(False)
    encoder.work(False)
    table.clock.run(1.0)
    decoder.work()
    table.clock.run(0.0)
    assert table.computing is decoder


@pytest.mark.parametrize(("task_share", "longest_s"), [(0.2, 0.125), (0.5, 0.125), (0.8, 0.225)])
def test_a_gap_is_about_one_step_of_the_other(task_share, longest_s):
    """Between two tokens lies the decoder's own step of 20 ms, and the encoder's turn: one step of 100 ms, or
    as many as its share asks for after a turn of the decoder's."""
    table = TurnTable(task_share)
    decoder, encoder = table.engine("decoder", "generate", 0.02), table.engine("encoder", "task", 0.1)
    decoder.work()
    encoder.work()
    gaps, last, steps = [], table.clock.now, 0
    while len(gaps) < 500:
        table.clock.run(0.001)
        if decoder.num_steps > steps:
            gaps.append(table.clock.now - last)
            last, steps = table.clock.now, decoder.num_steps
    print(f"the longest gap is {1000 * max(gaps):.0f} ms")
    assert encoder.num_steps > 10
    assert max(gaps) <= longest_s
    assert encoder.seat.used_s / (encoder.seat.used_s + decoder.seat.used_s) == pytest.approx(
        task_share, abs=0.03
    )


def test_one_that_dies_with_the_turn_gives_it_back():
    table = TurnTable(0.5)
    decoder, encoder = table.engine("decoder", "generate", 0.02), table.engine("encoder", "task", 0.02)
    decoder.work()
    encoder.work()
    table.clock.run(10.003)
    holder = table.device.holder
    dead, other = (decoder, encoder) if holder is decoder.seat else (encoder, decoder)
    dead.die()
    steps = other.num_steps
    table.clock.run(1.0)
    assert other.num_steps - steps >= 48
    dead.die()
    assert dead.seat.owes_from == math.inf
    again = table.engine("again", dead.kind, 0.02)
    again.work()
    table.clock.run(10.0)
    assert again.computed_s == pytest.approx(5.0, abs=0.2)
    for engine in (other, again):
        engine.die()
    assert table.device.holder is None
    assert table.device.seats == []
    last = table.engine("last", "task", 0.02)
    last.work()
    table.clock.run(1.0)
    assert last.num_steps >= 48


def test_one_that_was_told_and_dies_gives_it_back():
    table = TurnTable(0.5)
    decoder = table.engine("decoder", "generate", 100.0)
    encoder = table.engine("encoder", "task", 0.02)
    decoder.work()
    encoder.work()
    table.clock.run(50.0)
    assert encoder.num_steps == 0
    assert encoder.seat.owes_from == math.inf, "who waits owes no sign of life"
    assert decoder.seat.owes_from == pytest.approx(100.05), "it was told to end its turn then"
    decoder.die()
    table.clock.run(1.0)
    assert encoder.num_steps >= 48


def test_who_owes_a_sign_of_life():
    table = TurnTable(0.5)
    decoder, encoder = table.engine("decoder", "generate", 0.02, 0.001), table.engine("encoder", "task", 0.02)
    assert decoder.seat.owes_from == encoder.seat.owes_from == math.inf
    table.clock.run(5.0)
    decoder.work()
    assert decoder.seat.owes_from == 105.0
    decoder.work(False)
    assert decoder.seat.owes_from == math.inf
    encoder.work()
    assert decoder.seat.owes_from == 105.0, "idle, but it is to give the turn back"
    table.clock.run(1.0)
    assert decoder.seat.owes_from == math.inf
    assert encoder.seat.owes_from == pytest.approx(105.021), "after the step that the other one had begun"


def test_random_lives_are_never_two_at_once_and_never_none(rng):
    """Engines come, go, work, rest and die at any moment: the table fails where two compute at once."""
    handovers = steps = deaths = 0
    for _ in range(150):
        chances = random.Random(rng.random())
        table = TurnTable(chances.choice([0.2, 0.5, 0.8]))
        engines = [table.engine("first", "generate", 0.02)]
        for number in range(40):
            match chances.randrange(5):
                case 0 if len(engines) < 6:
                    kind = chances.choice(["generate", "task"])
                    delay_s = chances.choice([0.0, 0.001, 0.06])
                    engines.append(
                        table.engine(str(number), kind, chances.choice([0.001, 0.03, 0.2]), delay_s)
                    )
                case 1 if engines and chances.random() < 0.3:
                    engines.pop(chances.randrange(len(engines))).die()
                    deaths += 1
                case 2 | 3 if engines:
                    chances.choice(engines).work(chances.random() < 0.7)
                case _:
                    table.clock.run(chances.random())
        table.clock.run(1.0)
        for engine in engines:
            engine.work()
        before = [engine.num_steps for engine in engines]
        table.clock.run(60.0)
        assert all(
            engine.num_steps > steps_before for engine, steps_before in zip(engines, before, strict=True)
        )
        handovers += table.device.num_handovers
        steps += sum(engine.num_steps for engine in engines)
    print(f"{steps} steps, {handovers} hand-overs, {deaths} deaths")
    assert handovers > 1_000
    assert deaths > 20
