"""Reference pictures of a Kontext: found by name, cached at their sizes, and seen by the step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from atelier.trainers.buckets import Resolution
from atelier.trainers.caches import LatentCache
from atelier.trainers.caching import (
    LATENTS,
    LatentSettings,
    cache_latents,
    cache_prompts,
    latent_cache,
    prompt_cache,
)
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.dataset import Dataset, Record, Subset
from atelier.trainers.flow import sample_sigmas, seeded
from atelier.trainers.image_folder import image_folder
from atelier.trainers.inspection import report
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train, workload
from atelier.trainers.masks import Mask
from atelier.trainers.memory import estimate_training
from atelier.trainers.pictures import PictureSettings
from atelier.trainers.run_identity import RunIdentity
from dense import dense_transformer, stored_tensors
from diffusers import FluxKontextPipeline
from flux_files import write_flux
from PIL import Image
from torch import Tensor
from training import CONTEXT, VECTOR

CPU = torch.device("cpu")
AREA = Resolution(width=128, height=128, mode="buckets")


def picture(path: Path, size: tuple[int, int], seed: int) -> None:
    noise = torch.randint(256, (*size[::-1], 3), generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(noise.to(torch.uint8).numpy()).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Edits in `after`: one of the shape of its picture, one of another shape."""
    picture(tmp_path / "after" / "cat.png", (160, 160), 0)
    picture(tmp_path / "before" / "cat.webp", (200, 200), 1)
    picture(tmp_path / "after" / "dog.png", (160, 160), 2)
    picture(tmp_path / "before" / "dog.png", (200, 100), 3)
    return tmp_path


def read(folder: Path, **options: object) -> Subset:
    values = {"references": folder / "before", "resolution": AREA, **options}
    return image_folder(folder / "after", captions=CaptionSettings(missing="file name"), **values)  # pyright: ignore[reportArgumentType]


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for an autoencoder: means that tell the pixels, and a deviation that is not 0."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    mean = mean.repeat(1, 6, 1, 1)[:, :16]
    return mean, torch.full_like(mean, 0.1)


def encode_texts(texts: list[str]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(texts[0]))
    return (
        torch.randn(len(texts), 8, CONTEXT, generator=generator),
        torch.randn(len(texts), VECTOR, generator=generator),
    )


def cached(subset: Subset, folder: Path, kept: str = LATENTS[0]) -> TrainingData:
    dataset, settings = Dataset(subsets=(subset,)), LatentSettings(kept=kept)
    return TrainingData(
        latents=cache_latents(dataset, encode, "vae", folder / "latents", settings=settings),
        prompts=cache_prompts(dataset.texts, encode_texts, "clip", 8, folder / "prompts"),
    )


def test_a_reference_has_a_size_by_its_own_shape(folder: Path) -> None:
    subset = read(folder)
    sizes = {
        Path(record.path).name: [(how.width, how.height) for how in hows(record)]
        for record in subset.records
        for hows in (lambda r: (*subset.transforms(r), *subset.reference_transforms(r)),)
    }
    assert sizes["cat.png"] == [(128, 128), (128, 128)]
    (own, other) = sizes["dog.png"]
    assert own == (128, 128)
    assert other[0] > 1.5 * other[1]


def test_references_are_encoded_as_pictures_are(folder: Path) -> None:
    """The same picture as a picture and as a reference is one entry of the cache."""
    shown = cached(read(folder), folder).latents
    plain = Dataset(
        subsets=(
            image_folder(
                folder / "before", resolution=AREA, captions=CaptionSettings(missing="empty")
            ),
        )
    )
    assert {key for entry in shown.entries for key in entry.references} == set(
        latent_cache(plain, "vae", folder).keys
    )


def test_a_reference_is_its_mean_also_where_one_sample_is_kept(folder: Path) -> None:
    """Of a picture that is trained with itself as its reference, in one cache."""
    subset = read(folder, references=folder / "after")
    means, drawn = (cached(subset, folder, kept).latents for kept in LATENTS)
    for wanted, found in zip(means.entries, drawn.entries, strict=True):
        mean = means.load(wanted.keys[0]).mean
        assert torch.equal(drawn.load(found.references[0]).mean, mean)
        assert not torch.equal(drawn.load(found.keys[0]).mean, mean)
        assert drawn.load(found.references[0]).std.count_nonzero() == 0


def test_a_reference_is_cropped_and_mirrored_with_its_picture(folder: Path) -> None:
    """The edit of a picture lies on the picture, whatever is drawn for its crop."""
    size = (240, 160)
    for name in ("after/fox.png", "before/fox.png"):
        picture(folder / name, size, 9)
    settings = PictureSettings(crop="random", flip=True)
    subset = read(folder, pictures=settings, resolution=Resolution(width=96, height=96))
    data = cached(subset, folder)
    (fox,) = (
        entry
        for entry, record in zip(data.latents.entries, subset.records, strict=True)
        if "fox" in record.path
    )
    upright, mirrored = (data.latents.load(key).mean for key in fox.references)
    assert torch.equal(upright, data.latents.load(fox.keys[0]).mean)
    assert torch.equal(mirrored, data.latents.load(fox.keys[1]).mean)
    assert not torch.equal(upright, mirrored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "before" / "dog.png").unlink(), "dog.png has no reference in "),
        (lambda folder: (folder / "before" / "dog.png").write_text("no"), r"dog\.png"),
        (
            lambda folder: picture(folder / "before" / "dog.jpg", (9, 9), 0),
            "Two pictures have one name",
        ),
    ],
    ids=["missing", "no picture", "two"],
)
def test_what_is_wrong_with_a_reference_is_one_sentence(folder: Path, change, message) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_a_picture_without_a_reference_is_left_out_where_bad_files_are(folder: Path) -> None:
    (folder / "before" / "dog.png").unlink()
    subset = read(folder, on_bad_file="skip")
    assert [Path(record.path).name for record in subset.records] == ["cat.png"]
    assert any("has no reference" in sentence for sentence in subset.warnings)


def test_a_reference_that_is_cut_off_leaves_its_picture_out(folder: Path) -> None:
    path = folder / "before" / "dog.png"
    path.write_bytes(path.read_bytes()[:2000])
    data = cached(read(folder, on_bad_file="skip"), folder)
    assert len(data.latents.entries) == 1
    data.latents.require_complete()


def test_pictures_with_references_of_another_size_share_no_batch(folder: Path) -> None:
    data = cached(read(folder), folder)
    job = JobSettings(train=TrainSettings(batch_size=2))
    run = workload(job, base(folder), data, CPU)
    assert run.batch_size == 1
    assert run.reference_width * run.reference_height > 0


def base(folder: Path) -> LoadedFlux:
    return load_flux(write_flux(folder / "flux.safetensors"), format="bf16")


def settings(**changes: object) -> JobSettings:
    values = {"compute_dtype": "fp32", "gradient_accumulation": 1, "guidance": 2.5, **changes}
    return JobSettings(
        name="edits",
        length=Length(amount=1),
        train=TrainSettings(**values),  # pyright: ignore[reportArgumentType]
    )


def test_the_loss_of_a_step_is_that_of_diffusers_kontext(folder: Path) -> None:
    """From files to the first loss, whose LoRA is still 0: diffusers' network with the tokens and
    the positions of its Kontext pipeline, on the noise of that micro-step."""
    (folder / "after" / "cat.png").unlink()  # the one whose reference has its own shape stays
    data, job = cached(read(folder), folder), settings()
    found = train(open_run(folder, job, base(folder), data), base(folder), data, job).losses
    (entry,) = data.latents.entries
    generator = seeded(0, "micro-step", 0)
    picture = data.latents.load(entry.keys[0])
    latents = picture.mean + picture.std * torch.randn(picture.mean.shape, generator=generator)
    noise = torch.randn((1, *latents.shape), generator=generator)
    sigma = sample_sigmas(1, generator)
    expected = kontext_loss(data, latents[None], noise, sigma)
    assert len(found) == 1
    assert found[0] == pytest.approx(expected, rel=1e-4)


def kontext_loss(data: TrainingData, latents: Tensor, noise: Tensor, sigma: Tensor) -> float:
    """As diffusers' FluxKontextPipeline calls its network, with its loss of flow matching."""
    (entry,) = data.latents.entries
    reference = data.latents.load(entry.references[0]).mean[None]
    text = data.prompts.load(entry.texts[0][0])

    def ids(of: Tensor) -> Tensor:
        height, width = (side // 2 for side in of.shape[-2:])
        return FluxKontextPipeline._prepare_latent_image_ids(1, height, width, CPU, torch.float32)

    def packed(of: Tensor) -> Tensor:
        return FluxKontextPipeline._pack_latents(of, 1, *of.shape[1:])

    reference_ids = ids(reference)
    reference_ids[..., 0] = 1  # as its prepare_latents sets it
    noisy = (1 - sigma) * latents + sigma * noise
    with torch.no_grad():
        tokens = dense_transformer(stored_tensors("bf16"))(
            hidden_states=torch.cat([packed(noisy), packed(reference)], dim=1),
            encoder_hidden_states=text.prompt_embeds[None],
            pooled_projections=text.pooled[None],
            timestep=sigma,
            guidance=torch.full((1,), 2.5),
            img_ids=torch.cat([ids(noisy), reference_ids]),
            txt_ids=torch.zeros(8, 3),
        ).sample[:, : packed(noisy).shape[1]]
    return float((tokens - packed(noise - latents)).square().mean())


def test_references_are_counted_in_what_a_training_takes(folder: Path) -> None:
    """A reference of the picture's size takes what the other half of a picture twice as high
    does, but for what is lost at the end, where only the picture's tokens count."""
    (folder / "after" / "dog.png").unlink()
    model = base(folder)
    shown = workload(settings(), model, cached(read(folder), folder), CPU)
    assert (shown.reference_width, shown.reference_height) == (128, 128)
    higher = dataclasses.replace(shown, height=256, reference_width=0, reference_height=0)
    found, expected = (estimate_training(model.config, "bf16", one) for one in (shown, higher))
    assert found.batch == expected.batch - 4 * 16 * 16 * 16  # no noise of the reference
    assert found.activations == pytest.approx(expected.activations, rel=0.03)


def test_the_report_of_a_dataset_counts_them(folder: Path) -> None:
    lines = report(Dataset(subsets=(read(folder),)), TrainSettings())
    assert "Dataset after: pictures with a reference 2." in lines


def test_a_manifest_gives_them_back_and_one_of_before_has_none(folder: Path) -> None:
    cache = cached(read(folder), folder).latents
    values = json.loads(json.dumps(cache.to_json()))
    assert LatentCache.from_json(values) == cache
    for entry in values["subsets"][0]["entries"]:
        for name in ("references", "reference_width", "reference_height"):
            del entry[name]
    before = LatentCache.from_json(values)
    assert all(not entry.references for entry in before.entries)
    assert before.fingerprint() != cache.fingerprint()


def test_caches_and_runs_without_them_are_found_as_before() -> None:
    """Keys, fingerprints and the code of a run as the version before references gave them."""
    record = Record(
        path="/p/a.png",
        texts=(("a cat",),),
        content="0" * 64,
        width=300,
        height=200,
        mask=Mask(path="/m/a.png", content="1" * 64),
    )
    subset = Subset(
        records=(record,),
        resolution=Resolution(width=128, height=96),
        name="s",
        pictures=PictureSettings(flip=True),
    )
    latents = latent_cache(Dataset(subsets=(subset,)), "vae", "/c")
    prompts = prompt_cache(["a cat"], "clip", 77, "/c")
    assert [key[:16] for key in latents.keys] == [
        *("118a050c13eef203", "1a9c86339f9ef0a7"),
        *("09c7ca5704576968", "8340dcff24eab2ea"),
    ]
    assert [key[:16] for key in prompts.keys] == ["e82b3fdc79e16283", "c4b04d11cdec5b40"]
    assert latents.fingerprint()[:16] == "69ab1acf433c1c19"
    assert prompts.fingerprint()[:16] == "0ad34b7f2869e31a"
    identity = RunIdentity(
        base="b",
        base_format="nf4",
        latents=latents.fingerprint(),
        prompts=prompts.fingerprint(),
        job=JobSettings(),
    )
    assert identity.hash8() == "79b5cb80"
