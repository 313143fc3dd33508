"""Which units there are, and their seeds."""

from coupfast.evaluation.units import Schedule, Unit, derive_seed


def test_seeds_are_fixed_for_all_time():
    # Written down: a change would make every run of before unrepeatable.
    assert derive_seed(121, "apgd-ce-00000", "attack") == 648553927735492143
    assert 0 <= derive_seed(0, "a") < 2**63
    seeds = {derive_seed(seed, f"unit-{i}", kind) for seed in range(5) for i in range(50) for kind in ("attack", "defense")}
    assert len(seeds) == 500
    assert derive_seed(1, "2/a") != derive_seed(12, "a")


def names(units):
    return [(unit.name, unit.images) for unit in units]


def test_shards_run_through_the_stages_by_themselves():
    schedule = Schedule(images=5, shard=2, attacks=("a", "b"))
    assert names(schedule.ready({})) == [("clean-00000", (0, 1)), ("clean-00001", (2, 3)), ("clean-00002", (4,))]
    standing = {"clean-00000": [1], "clean-00001": [], "clean-00002": [4], "a-00002": [4]}
    # The second shard has nobody left to attack and goes to its judge; the third is ahead of the first.
    assert names(schedule.ready(standing)) == [("a-00000", (1,)), ("judge-00001", (2, 3)), ("b-00002", (4,))]


def test_randomized_defenses_are_attacked_where_one_clean_draw_was_wrong():
    schedule = Schedule(images=4, shard=2, attacks=("a", "b"), attack_all=True)
    standing = {"clean-00000": [1], "clean-00001": []}
    assert names(schedule.ready(standing)) == [("a-00000", (0, 1)), ("a-00001", (2, 3))]
    standing |= {"a-00000": [0], "a-00001": []}
    assert names(schedule.ready(standing)) == [("b-00000", (0,)), ("judge-00001", (2, 3))]


def test_regrouped_shards_wait_and_are_cut_anew():
    schedule = Schedule(images=5, shard=2, attacks=("a", "b"), regroup=True)
    standing = {"clean-00000": [1], "clean-00001": [2, 3]}
    assert names(schedule.ready(standing)) == [("clean-00002", (4,))]
    standing["clean-00002"] = [4]
    assert names(schedule.ready(standing)) == [("a-00000", (1, 2)), ("a-00001", (3, 4))]
    standing |= {"a-00000": [2], "a-00001": [3]}
    assert names(schedule.ready(standing)) == [("b-00000", (2, 3))]
    standing["b-00000"] = []
    judges = [("judge-00000", (0, 1)), ("judge-00001", (2, 3)), ("judge-00002", (4,))]
    assert names(schedule.ready(standing)) == judges


def test_it_ends():
    schedule = Schedule(images=3, shard=2, attacks=("a",))
    standing = {}
    for _ in range(10):
        for unit in schedule.ready(standing):
            standing[unit.name] = unit.images
    assert schedule.ready(standing) == [] and len(standing) == 6


def test_unit_names_sort_in_order():
    assert Unit("a", 9, ()).name < Unit("a", 10, ()).name
