"""A dataset in two: which pictures are held out, and what is refused."""

import dataclasses
import hashlib

import pytest
from atelier.trainers.buckets import Resolution
from atelier.trainers.dataset import Dataset, Record, Subset
from atelier.trainers.splitting import split_dataset


def record(name: str, caption: str = "a cat") -> Record:
    content = hashlib.sha256(name.encode()).hexdigest()
    return Record(path=f"/{name}.png", texts=((caption,),), content=content, width=64, height=64)


def subset(names: list[str], name: str = "cats") -> Subset:
    resolution = Resolution(width=64, height=64)
    return Subset(records=tuple(map(record, names)), resolution=resolution, name=name)


def names_of(dataset: Dataset) -> list[list[str]]:
    return [[r.path[1:-4] for r in one.records] for one in dataset.subsets]


PICTURES = [f"picture {number}" for number in range(40)]


@pytest.mark.parametrize(
    ("amount", "unit", "expected"),
    [(10, "percent", 4), (1, "percent", 1), (99, "percent", None), (7, "pictures", 7)],
)
def test_as_many_are_held_out_as_asked(amount: int, unit: str, expected: int | None) -> None:
    dataset = Dataset(subsets=(subset(PICTURES),))
    if expected is None:
        with pytest.raises(ValueError, match=r"^Holding 99 percent out of 'cats' would leave noth"):
            split_dataset(dataset, amount, unit)
        return
    (training,), (held_out,) = map(names_of, split_dataset(dataset, amount, unit))
    assert len(held_out) == expected
    assert [n for n in PICTURES if n not in held_out] == training  # in their order


def test_the_order_of_the_pictures_does_not_matter() -> None:
    one, other = (Dataset(subsets=(subset(names),)) for names in (PICTURES, PICTURES[::-1]))
    (held_out,) = names_of(split_dataset(one, 5, "pictures")[1])
    assert set(held_out) == set(names_of(split_dataset(other, 5, "pictures")[1])[0])


def test_a_picture_that_is_added_moves_at_most_one_other() -> None:
    for count in range(10, 40):
        before, after = (
            set(
                names_of(split_dataset(Dataset(subsets=(subset(PICTURES[:n]),)), 4, "pictures")[1])[
                    0
                ]
            )
            for n in (count, count + 1)
        )
        assert len(before - after) <= 1
        assert after - before <= {PICTURES[count]}


def test_copies_of_a_picture_stay_together() -> None:
    copies = [record(name, caption) for name in PICTURES for caption in ("a cat", "a dog")]
    resolution = Resolution(width=64, height=64)
    dataset = Dataset(subsets=(Subset(records=tuple(copies), resolution=resolution, name="x"),))
    training, held_out = split_dataset(dataset, 25, "percent")
    sides = [{r.content for r in one.subsets[0].records} for one in (training, held_out)]
    assert not sides[0] & sides[1]
    assert (len(sides[1]), len(held_out.subsets[0].records)) == (10, 20)


def test_a_picture_of_several_subsets_is_on_one_side() -> None:
    both = Dataset(subsets=(subset(PICTURES[:30], "a"), subset(PICTURES[20:], "b")))
    both = both.at_sizes([(128, 128)])
    training, held_out = split_dataset(both, 20, "percent")
    used, measured = ({n for one in names_of(d) for n in one} for d in (training, held_out))
    assert not used & measured
    assert used | measured == set(PICTURES)
    assert all(names_of(training))
    assert all(names_of(held_out))
    assert [one.resolution for one in held_out.subsets] == [one.resolution for one in both.subsets]


def test_all_else_of_a_subset_stays() -> None:
    whole = dataclasses.replace(subset(PICTURES), is_regularization=True, told=("a warning",))
    training, held_out = split_dataset(Dataset(subsets=(whole,)), 10, "percent")
    for side in (training.subsets[0], held_out.subsets[0]):
        assert dataclasses.replace(side, records=whole.records) == whole


@pytest.mark.parametrize("amount", [1, 5])
def test_a_subset_that_would_be_empty_is_named(amount: int) -> None:
    dataset = Dataset(subsets=(subset(PICTURES), subset(["one", "one"], "single")))
    with pytest.raises(ValueError, match=rf"^Holding {amount} pictures out of 'single' .* 1 diff"):
        split_dataset(dataset, amount, "pictures")


def test_nothing_held_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^At least 1 of the pictures must be held out, got 0\."):
        split_dataset(Dataset(subsets=(subset(PICTURES),)), 0, "pictures")
