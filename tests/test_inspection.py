"""The report of a dataset: its numbers are those of the training."""

import shutil
from pathlib import Path

import pytest
from atelier.trainers.batches import BatchOrder
from atelier.trainers.buckets import Resolution
from atelier.trainers.caching import latent_cache
from atelier.trainers.config import Schedule, TrainSettings
from atelier.trainers.dataset import Dataset, Subset
from atelier.trainers.image_folder import image_folder
from atelier.trainers.inspection import num_batches, num_samples, report
from PIL import Image

BUCKETS = Resolution(width=64, height=96, mode="buckets")


def subset(folder: Path, *sizes: tuple[int, int], repeats: int = 1) -> Subset:
    folder.mkdir()
    for index, size in enumerate(sizes):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"caption {index}", encoding="utf-8")
    return image_folder(folder, resolution=BUCKETS, repeats=repeats)


def lines(dataset: Dataset, batch_size: int = 1, gradient_accumulation: int = 1) -> list[str]:
    settings = TrainSettings(batch_size=batch_size, gradient_accumulation=gradient_accumulation)
    return report(dataset, settings)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_are_those_of_the_training(tmp_path: Path, batch_size: int) -> None:
    shapes = [(64, 96), (64, 96), (96, 64), (80, 80), (70, 100)]
    first = subset(tmp_path / "a", *shapes, repeats=3)
    other = subset(tmp_path / "b", *shapes[:2])
    dataset = Dataset(subsets=(first, other)).at_sizes([(128, 128)])
    cache = latent_cache(dataset, "encoder", tmp_path)
    order = BatchOrder(cache.subsets, batch_size=batch_size, seed=0)
    counted = [num_batches(num_samples(one), batch_size) for one in dataset.subsets]
    assert sum(counted) == order.batches_per_epoch


def test_the_report_says_what_an_epoch_is(tmp_path: Path) -> None:
    data = subset(tmp_path / "valley", (64, 96), (64, 96), (64, 96), (96, 64))
    assert lines(Dataset(subsets=(data,)), batch_size=2, gradient_accumulation=2) == [
        "Epoch: samples 4 of 4 pictures; batches of up to 2: 3; steps with gradient accumulation "
        "2: 1.5.",
        "Dataset valley: pictures 4, samples per epoch 4.",
        "Size 64x96 of valley: samples 3, batches 2, one of them with only 1.",
        "Size 96x64 of valley: samples 1, batches 1, one of them with only 1.",
    ]


def test_shares_starts_and_regularization_are_named(tmp_path: Path) -> None:
    parts = [Dataset(subsets=(subset(tmp_path / name, (64, 96)),)) for name in ("a", "b")]
    first = parts[0].scheduled(Schedule(probability=3), is_regularization=False)
    other = parts[1].scheduled(Schedule(probability=1, start_step=9), is_regularization=True)
    found = lines(Dataset(subsets=(*first.subsets, *other.subsets)))
    assert "Dataset a: share of the batches 75.0%." in found
    assert "Dataset b: share of the batches 25.0%." in found
    assert "Dataset b: seen from step 9 on." in found
    assert "Dataset b: regularization, which keeps what the model can draw already." in found
    assert not [line for line in found if line.startswith("Dataset a: regularization")]


def test_one_folder_at_two_sizes_is_told_apart_and_holds_no_duplicates(tmp_path: Path) -> None:
    data = Dataset(subsets=(subset(tmp_path / "a", (256, 256)),)).at_sizes([(128, 128)])
    found = lines(data)
    assert "Dataset a at 64x96: pictures 1, samples per epoch 1." in found
    assert "Dataset a at 128x128: pictures 1, samples per epoch 1." in found
    assert not [line for line in found if "more than once" in line]


def test_equal_files_are_named_within_and_between_subsets(tmp_path: Path) -> None:
    subset(tmp_path / "a", (64, 96), (64, 96))
    subset(tmp_path / "b", (96, 64))
    for name in ("a/copy", "b/again"):
        shutil.copy(tmp_path / "a" / "0.png", tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a copy", encoding="utf-8")
    read = (image_folder(tmp_path / name, resolution=BUCKETS) for name in ("a", "b"))
    found = lines(Dataset(subsets=tuple(read)))
    assert "Pictures that are there more than once: 0.png = copy.png = again.png." in found


def test_warnings_of_the_dataset_are_in_the_report(tmp_path: Path) -> None:
    data = Dataset(subsets=(subset(tmp_path / "a", (20, 30)),))
    assert lines(data)[-1] == "Pictures enlarged to the training size: 0.png."


def test_many_sizes_are_not_all_listed(tmp_path: Path) -> None:
    sizes = [(512, 512 + 64 * step) for step in range(25)]
    data = subset(tmp_path / "a", *sizes)
    many = Resolution(width=512, height=512, mode="preserved", max_aspect=8)
    whole = Dataset(subsets=(Subset(records=data.records, resolution=many, name="a"),))
    named = [line for line in lines(whole) if line.startswith("Size")]
    different = {many.size_for(*size) for size in sizes}
    assert len(different) > len(named) == 20
    assert f"Dataset a: further sizes, with fewer pictures {len(different) - 20}." in lines(whole)
