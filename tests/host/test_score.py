"""The picture–text score of ComfyUI's objects against transformers' own CLIPModel."""

import json
from collections.abc import Iterator
from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.sd
import executor
import folder_paths
import numpy as np
import pytest
import torch
from atelier.nodes.native import build_model
from atelier.nodes.sampling import encode_prompt
from atelier.nodes.score import picture_text_scores, require_one_space
from atelier.nodes.session import Asker, Session
from atelier.nodes.validation import EncodedPrompt, Sampler, Score, Validation
from atelier.trainers.load import load_flux
from atelier.trainers.rhythm import Rhythm
from clip_files import (
    SIDE,
    clip_model,
    load_clip,
    load_vision,
    random_pictures,
    sizes,
    tensors,
    write_text_encoder,
)
from comfy import sdxl_clip
from comfy.supported_models_base import ClipTarget
from flux_files import write_flux
from PIL import Image
from runs import job
from safetensors.torch import save_file
from torch import Tensor
from training import training_data
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

TOKENIZER = Path(comfy.sd.__file__).parent / "sd1_tokenizer"
TEXTS = [
    "a cat",
    "a (cat:1.3) and ((a dog)) [fish], embedding:x",
    " ".join(f"word{number}" for number in range(60)),  # more than 77 tokens
]


def scores_of_transformers(
    model: CLIPModel, pictures: Tensor, texts: list[str], side: int = SIDE
) -> list[float]:
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    size = {"height": side, "width": side}
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size)
    eight_bit = (pictures * 255).round().byte().numpy()
    pixels = processor(list(eight_bit), return_tensors="pt")["pixel_values"]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        given = model(pixel_values=pixels, **tokens)
    return (100 * (given.image_embeds * given.text_embeds).sum(dim=-1)).tolist()


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    model = clip_model()
    clip = load_clip(model, write_text_encoder(tmp_path, model))
    pictures = random_pictures(3)
    expected = scores_of_transformers(model, pictures, TEXTS)
    found = picture_text_scores(load_vision(tmp_path, model), clip, pictures, TEXTS)
    assert max(expected) - min(expected) > 3
    assert found == pytest.approx(expected, abs=0.02)


def test_larger_pictures_are_prepared_as_transformers_does(tmp_path: Path) -> None:
    model = clip_model()
    clip = load_clip(model, write_text_encoder(tmp_path, model))
    pictures = random_pictures(2, 128, 192)
    expected = scores_of_transformers(model, pictures, TEXTS[:2])
    found = picture_text_scores(load_vision(tmp_path, model), clip, pictures, TEXTS[:2])
    assert found == pytest.approx(expected, abs=0.3)


def test_the_clip_encodes_as_before_afterwards(tmp_path: Path) -> None:
    model = clip_model()
    clip = load_clip(model, write_text_encoder(tmp_path, model))
    before = clip.encode_from_tokens(clip.tokenize("a cat"), return_pooled=True)
    picture_text_scores(load_vision(tmp_path, model), clip, random_pictures(1), ["a dog"])
    after = clip.encode_from_tokens(clip.tokenize("a cat"), return_pooled=True)
    assert all(map(torch.equal, before, after))


def test_of_two_text_encoders_the_one_of_the_same_clip_is_taken(tmp_path: Path) -> None:
    small, large = clip_model(), clip_model(space=80, depth=32, act="gelu")
    options = {"clip_l_model_config": sizes(small), "clip_g_model_config": sizes(large)}
    target = ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel)
    clip = comfy.sd.CLIP(target, model_options=options)
    for model in (small, large):
        clip.load_sd(tensors(model, "text_"))
    pictures = random_pictures(3)
    for model in (small, large):
        found = picture_text_scores(load_vision(tmp_path, model), clip, pictures, TEXTS)
        assert found == pytest.approx(scores_of_transformers(model, pictures, TEXTS), abs=0.02)


@pytest.mark.parametrize("left_in_memory", [0.0, float("nan"), "identity"])
def test_a_text_encoder_without_projection_is_refused(
    tmp_path: Path, left_in_memory: float | str
) -> None:
    model = clip_model()
    del model.text_projection
    clip = load_clip(model, write_text_encoder(tmp_path, model))
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    with torch.no_grad():
        weight.copy_(
            torch.eye(64) if left_in_memory == "identity" else torch.tensor(left_in_memory)
        )
    with pytest.raises(ValueError, match=r"^The file of the text encoder clip_l has no text_proj"):
        picture_text_scores(
            load_vision(tmp_path, clip_model()), clip, random_pictures(1), ["a cat"]
        )


def test_what_only_looks_like_a_projection_is_refused_where_the_file_is_known(
    tmp_path: Path,
) -> None:
    model = clip_model()
    del model.text_projection
    clip = load_clip(model, write_text_encoder(tmp_path, model))
    if not hasattr(clip.patcher, "cached_patcher_init"):
        pytest.skip("this ComfyUI does not remember the file")
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    with torch.no_grad():
        weight.copy_(torch.randn(64, 64))
    with pytest.raises(ValueError, match=r"^The file of the text encoder clip_l has no text_proj"):
        require_one_space(load_vision(tmp_path, clip_model()), clip)


@pytest.mark.slow
def test_one_file_of_a_whole_clip_of_true_size_serves_both_loaders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ViT-L/14 with openai/clip-vit-large-patch14's names and shapes, and random weights."""
    import folder_paths

    import nodes

    torch.manual_seed(0)
    text = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"intermediate_size": 4096, "patch_size": 14}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=768)
    model = CLIPModel(config).half().float().eval()
    save_file(
        {
            n: t.half().contiguous()
            for n, t in model.state_dict().items()
            if "position_ids" not in n
        },
        tmp_path / "model.safetensors",
    )
    for kind in ("text_encoders", "clip_vision"):
        _, extensions = folder_paths.folder_names_and_paths[kind]
        known = {**folder_paths.folder_names_and_paths, kind: ([str(tmp_path)], extensions)}
        monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    (clip,) = nodes.CLIPLoader().load_clip("model.safetensors", "stable_diffusion")
    (vision_model,) = nodes.CLIPVisionLoader().load_clip("model.safetensors")
    pictures = random_pictures(2, 224, 224)
    found = picture_text_scores(vision_model, clip, pictures, TEXTS[:2])
    assert found == pytest.approx(
        scores_of_transformers(model, pictures, TEXTS[:2], side=224), abs=0.05
    )


def test_a_vision_model_without_projection_is_refused(tmp_path: Path) -> None:
    model = clip_model()
    clip = load_clip(model, write_text_encoder(tmp_path, model))
    vision = load_vision(tmp_path, model)
    vision.model.visual_projection = torch.nn.Identity()  # what ComfyUI makes of such a file
    with pytest.raises(ValueError, match=r"^This CLIP vision model has no projection"):
        picture_text_scores(vision, clip, random_pictures(1), ["a cat"])


def test_halves_of_two_clips_are_refused(tmp_path: Path) -> None:
    model = clip_model()
    clip = load_clip(model, write_text_encoder(tmp_path, model))
    vision = load_vision(tmp_path, clip_model(space=80))
    with pytest.raises(ValueError, match=r"which gives 80 numbers of a picture: it gives 64 of"):
        picture_text_scores(vision, clip, random_pictures(1), ["a cat"])


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    yield tmp_path / "output"
    comfy.model_management.unload_all_models()
    executor.forget_networks()


def scores_on_disk(folder: Path) -> dict[int, float]:
    """In order of their steps, as the curves need them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    scores = [(line["step"], line["score"]) for line in lines if "score" in line]
    assert len(scores) == len(dict(scores))
    return dict(scores)


def test_a_run_has_the_mean_score_of_its_pictures_at_every_step(
    tmp_path: Path, output: Path
) -> None:
    """Also if a crash came between two pictures, and if other prompts are drawn later, or another
    model tells the score."""
    clip = clip_model()
    score = Score(
        vision=load_vision(tmp_path, clip),
        text=load_clip(clip, write_text_encoder(tmp_path, clip)),
    )
    flux = load_flux(write_flux(tmp_path / "flux.safetensors"), format="nf4")
    model, data = build_model(flux, torch.float32), training_data(tmp_path / "caches")
    asker, settings = Asker(node_id="1"), job(3, checkpoint_every=1)

    def train(*texts: str, score: Score | None = score) -> Path:
        prompts = [
            EncodedPrompt(name=text, text=text, positive=positive, negative=positive)
            for text in texts
            for positive in [encode_prompt(executor.nano_clip(), text, 1.0)]
        ]
        validation = Validation(
            rhythm=Rhythm(every=1),
            vae=executor.nano_vae(),
            prompts=tuple(prompts),
            sizes=((64, 64),),
            sampler=Sampler(steps=1),
            score=score,
        )
        Session(model, data, settings, asker, validation).train()
        (path,) = output.glob("atelier/*/run.json")
        return path.parent

    def expected(folder: Path, step: int) -> float:
        listed = json.loads((folder / "samples" / "samples.json").read_text(encoding="utf-8"))
        paths = [folder / "samples" / f"step-{step:06d}-{one['key']}.png" for one in listed]
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])
        texts = [one["prompt"] for one in listed]
        return float(np.mean(scores_of_transformers(clip, pixels.float() / 255, texts)))

    folder = train("a red circle", "a dog", score=None)
    assert scores_on_disk(folder) == {}
    train("a red circle", "a dog")
    scores = scores_on_disk(folder)
    assert list(scores) == [0, 1, 2, 3]
    for step, value in scores.items():
        assert value == pytest.approx(expected(folder, step), abs=0.3)
    first = json.loads((folder / "samples" / "samples.json").read_text(encoding="utf-8"))[0]
    (folder / "samples" / f"step-000002-{first['key']}.png").unlink()
    train("a red circle", "a dog")
    assert scores_on_disk(folder) == scores
    train("a cat")
    others = scores_on_disk(folder)
    assert list(others) == [0, 1, 2, 3]
    assert others != scores
    for step, value in others.items():
        assert value == pytest.approx(expected(folder, step), abs=0.3)
    train("a red circle", "a dog")
    train("a dog")  # whose pictures are there
    for step, value in scores_on_disk(folder).items():
        assert value == pytest.approx(expected(folder, step), abs=0.3)
    clip = clip_model(depth=2)
    (tmp_path / "other").mkdir()
    vision = load_vision(tmp_path / "other", clip)
    text = load_clip(clip, write_text_encoder(tmp_path / "other", clip))
    train("a dog", score=Score(vision=vision, text=text))
    by_other = scores_on_disk(folder)
    assert list(by_other) == [0, 1, 2, 3]
    for step, value in by_other.items():
        assert value == pytest.approx(expected(folder, step), abs=0.3)
