"""Variants of recipes: what has to be trained for them."""

from benchmarks.recipes import only_searches


def test_only_a_variant_that_changes_nothing_but_the_search_needs_no_training() -> None:
    assert only_searches(["search.consensus=0", "data.root=elsewhere"])
    assert not only_searches(["search.consensus=0", "train.epochs=1"])
