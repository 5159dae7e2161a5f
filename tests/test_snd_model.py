import copy
from dataclasses import replace

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras

from snd_nerfstudio.backbones.build import build_trainable
from snd_nerfstudio.distillation.head import DINOHead
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.rooms import RoomsConfig, generate_rooms
from snd_nerfstudio.snd_pipeline import SnDPipeline
from snd_nerfstudio.supervision.pooling import pool
from snd_nerfstudio.supervision.upsampling import upsample
from snd_nerfstudio.viewer.display import Display
from snd_nerfstudio.viewer.outputs import to_pinhole


@pytest.fixture
def pipeline(tiny_config) -> SnDPipeline:
    return tiny_config.pipeline.setup(device="cpu")


def training_of(config, trains, **settings) -> SnDPipeline:
    """In training mode; with `blocks` the last two of four."""
    config = copy.deepcopy(config.pipeline)
    config.checked_triplets = 0
    for name, value in {"trains": trains, "last_blocks": 2, **settings}.items():
        setattr(config.model, name, value)
    return config.setup(device="cpu").train()


def step(pipeline, number=0):
    return pipeline.get_train_loss_dict(number)


def camera(height, width, like=None):
    pose = torch.eye(4)[None, :3] if like is None else like
    return Cameras(pose, fx=50.0, fy=50.0, cx=width / 2, cy=height / 2, height=height, width=width)


def test_a_step_gives_the_loss_and_what_it_is_made_of(pipeline):
    _, losses, metrics = step(pipeline)
    loss = losses["distillation"]
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    assert float(loss) == pytest.approx(float(metrics["teacher_entropy"] + metrics["kl"]), abs=1e-5)
    assert metrics["kl"] > 0 and 0 < metrics["cosine"] < 1
    assert metrics["coverage"] > 0.9 and metrics["learned_tokens"] > 0.9


@pytest.mark.parametrize(
    ("trains", "belongs"),
    [
        ("lora", lambda name: ".lora_" in name),
        ("blocks", lambda name: name.startswith(("blocks.2.", "blocks.3.", "norm."))),
        ("full", lambda name: True),
    ],
)
def test_what_is_to_be_trained_and_the_head_get_a_gradient_and_nothing_else(tiny_config, trains, belongs):
    pipeline = training_of(tiny_config, trains)
    step(pipeline)[1]["distillation"].backward()
    vit = dict(pipeline.model.student.backbone.vit.named_parameters())
    expected = {f"student.backbone.vit.{name}" for name in vit if belongs(name)}
    expected |= {f"student.head.{name}" for name, _ in pipeline.model.student.head.named_parameters()}
    trained = {name for name, p in pipeline.model.named_parameters() if p.requires_grad and p.numel()}
    assert trained == expected
    for name, parameter in pipeline.model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    groups = pipeline.get_param_groups()
    assert set(groups) == {"backbone", "head"} and sum(map(len, groups.values())) == len(trained)


@pytest.mark.parametrize(
    ("trains", "layers", "said"),
    [
        ("lora", ["blocks.0-3.attn.{qkv,proj}"], "adapters of rank 8 in 8 layers: blocks.0-3.attn.{qkv,proj}; "),
        ("blocks", ["blocks.2-3", "norm"], "training blocks.2-3, norm; "),
        (
            "full",
            ["cls_token", "pos_embed", "patch_embed", "blocks", "norm"],
            "training cls_token, pos_embed, patch_embed, blocks, norm; ",
        ),
    ],
)
def test_which_layers_are_trained_is_said_and_kept(tiny_config, logged, trains, layers, said):
    model = training_of(tiny_config, trains).model
    assert model.trained_layers == layers
    printed = logged()
    trained = sum(p.numel() for _, p in named_trained(model))
    frozen = sum(p.numel() for p in model.student.parameters()) - trained
    assert f"tiny: {said}{trained:,} trained parameters, {frozen:,} frozen." in printed


def test_the_teacher_starts_as_the_student_and_shares_its_base(pipeline):
    model = pipeline.model
    image = torch.rand(1, 3, 56, 84)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.teacher_tokens(image), model.student_tokens(image))
        for name, parameter in model.student.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
        assert not torch.allclose(model.teacher_tokens(image), model.student_tokens(image), atol=1e-2)
        model.teacher.update(model.student, momentum=0.0)
        torch.testing.assert_close(model.teacher_tokens(image), model.student_tokens(image))
    shadowed = sum(buffer.numel() for buffer in model.teacher.buffers())
    assert shadowed == sum(p.numel() for p in model.student.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("timing", "momentum"), [("after_optimizer", 0.5), ("before_optimizer", 0.5), ("after_optimizer", 1.0)]
)
def test_the_teacher_moves_every_so_many_steps_at_its_time_or_never(tiny_config, clean_writers, timing, momentum):
    tiny_config.pipeline.model.ema_timing = timing
    tiny_config.pipeline.model.ema_momentum = momentum
    tiny_config.pipeline.model.ema_every = 2
    trainer = tiny_config.setup()
    trainer.setup()
    moved = []
    before = copy.deepcopy(trainer.pipeline.model.teacher.values())
    original = trainer.pipeline.model.update_teacher

    def watched():
        moved.append(trainer.step)
        original()

    trainer.pipeline.model.update_teacher = watched
    trainer.train()
    assert moved == ([0, 2, 4] if momentum < 1 else [])
    after = trainer.pipeline.model.teacher.values()
    changed = any(not torch.equal(before[name], after[name]) for name in before)
    assert changed == (momentum < 1)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_the_losses_without_a_head(tiny_config, loss):
    tiny_config.pipeline.model.loss = loss
    pipeline = tiny_config.pipeline.setup(device="cpu")
    assert pipeline.model.student.head is None and set(pipeline.get_param_groups()) == {"backbone"}
    _, losses, metrics = step(pipeline)
    if loss == "cosine":
        assert float(losses["distillation"]) == pytest.approx(1 - float(metrics["cosine"]), abs=1e-6)
    losses["distillation"].backward()


def test_the_head_s_quadratic_form_and_its_chunks_give_nearly_the_exact_loss_and_gradient(tiny_config, monkeypatch):
    def all_logits(*_):
        raise AssertionError("no form needs all logits at once")

    monkeypatch.setattr(DINOHead, "forward", all_logits)
    losses, gradients = {}, {}
    for form, max_logits in (("exact", 2**24), ("exact", 1000), ("quadratic", 2**24)):
        config = copy.deepcopy(tiny_config)
        config.pipeline.model.head.form, config.pipeline.model.head.max_logits = form, max_logits
        config.pipeline.model.student_temperature = config.pipeline.model.teacher_temperature = 1.0
        pipeline = config.pipeline.setup(device="cpu")
        _, loss, metrics = step(pipeline)
        loss["distillation"].backward()
        losses[form, max_logits] = torch.stack(
            [loss["distillation"].detach(), metrics["kl"], metrics["teacher_entropy"]]
        )
        groups = pipeline.get_param_groups()
        gradients[form, max_logits] = {
            name: torch.cat([p.grad.flatten() for p in group]) for name, group in groups.items()
        }
    exact = ("exact", 2**24)
    torch.testing.assert_close(losses["exact", 1000], losses[exact], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["quadratic", 2**24], losses[exact], rtol=0.02, atol=1e-5)
    assert float(losses["quadratic", 2**24][0]) == pytest.approx(float(losses[exact][0]), abs=1e-4)
    for name, expected in gradients[exact].items():
        torch.testing.assert_close(gradients["exact", 1000][name], expected, rtol=1e-3, atol=1e-6)
        assert torch.cosine_similarity(gradients["quadratic", 2**24][name], expected, dim=0) > 0.999, name


@pytest.mark.parametrize("profile", ["fixed", "paper", "official"])
def test_every_profile_trains(tiny_config, profile):
    tiny_config.pipeline.profile = profile
    pipeline = tiny_config.pipeline.setup(device="cpu")
    _, losses, metrics = step(pipeline)
    losses["distillation"].backward()
    assert torch.isfinite(losses["distillation"])
    assert (metrics["isolated_pixels"] > 0) and metrics["learned_tokens"] > 0.9


def test_uncovered_tokens_are_dropped_kept_or_zeroed(tiny_config):
    outputs = {}
    for rule in ("drop", "keep", "zero"):
        config = copy.deepcopy(tiny_config)
        config.pipeline.model.supervision.uncovered = rule
        pipeline = config.pipeline.setup(device="cpu")
        (triplet,) = pipeline.datamanager.next_train(0)
        triplet.context.depths[:, :, 30:] = 0  # the right side of both contexts has no geometry
        gaussians = pipeline.datamanager.reconstruct(triplet.context)
        outputs[rule] = pipeline.model.supervise(triplet, gaussians)
    assert 0.2 < outputs["drop"].learned.float().mean() < 0.9
    assert outputs["keep"].learned.all() and not outputs["keep"].zeroed.any()
    assert outputs["zero"].learned.all() and 0.1 < outputs["zero"].zeroed.float().mean() < 0.8
    assert (outputs["zero"].tokens[outputs["zero"].zeroed] == 0).all()


@pytest.mark.parametrize("blending", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("profile", ["fixed", "paper", "official"])
def test_target_tokens_are_the_same_from_an_operator_from_gaussians_and_step_by_step(tiny_config, profile, blending):
    tiny_config.pipeline.profile = profile
    tiny_config.pipeline.model.supervision.blending = blending
    assert tiny_config.pipeline.model.supervision.path == "token"
    token = tiny_config.pipeline.setup(device="cpu", test_mode="test")
    tiny_config.pipeline.model.supervision.path = "dense"
    dense = tiny_config.pipeline.setup(device="cpu", test_mode="test").model
    (triplet,) = token.datamanager.next_train(0)
    triplet.context.depths[:, :, 30:] = 0  # the right side of both contexts has no geometry
    gaussians = token.datamanager.reconstruct(triplet.context)
    operator = token.model.operators.make(triplet, gaussians, for_any_blending=True)
    assert operator.blendable and (operator.black is not None) == (profile == "official")
    expected = dense.supervise(triplet, gaussians)
    for found in (token.model.supervise(triplet, gaussians), token.model.supervise(triplet, operator)):
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.coverage, expected.coverage, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.isolated, expected.isolated, rtol=0, atol=1e-6)
        assert torch.equal(found.learned, expected.learned) and torch.equal(found.zeroed, expected.zeroed)
    assert expected.learned.all() == (profile != "fixed") and expected.zeroed.any() == (profile == "official")


def test_a_step_without_any_covered_token_has_no_loss_but_gradients(pipeline):
    (triplet,) = pipeline.datamanager.next_train(0)
    gaussians = pipeline.datamanager.reconstruct(triplet.context)
    gaussians.opacities.zero_()
    outputs = pipeline.model([triplet], [gaussians])
    assert float(outputs["loss"]) == 0 and float(outputs["learned_tokens"]) == 0
    outputs["loss"].backward()
    assert all(p.grad is not None for p in pipeline.model.student.parameters() if p.requires_grad)


def test_dropout_in_the_student_follows_the_step_and_leaves_the_global_generator_alone(tiny_config):
    tiny_config.pipeline.model.lora.dropout = 0.5
    pipeline = tiny_config.pipeline.setup(device="cpu").train()
    with torch.no_grad():
        for name, parameter in pipeline.model.student.named_parameters():
            if "lora_B" in name:
                parameter += 0.5
    torch.manual_seed(1)
    first = float(step(pipeline, 3)[1]["distillation"].detach())
    drawn = torch.rand(1)
    again = float(step(pipeline, 3)[1]["distillation"].detach())
    torch.manual_seed(1)
    assert first == again and torch.equal(drawn, torch.rand(1))
    (triplet,) = pipeline.datamanager.next_train(3)
    gaussians = pipeline.datamanager.reconstruct(triplet.context)
    losses = {float(pipeline.model([triplet], [gaussians], seed)["loss"].detach()) for seed in range(4)}
    assert len(losses) == 4


def test_the_teachers_dropout_of_the_official_profile_is_for_training_alone(tiny_config):
    tiny_config.pipeline.profile = "official"
    tiny_config.pipeline.model.lora.dropout = 0.5
    model = tiny_config.pipeline.setup(device="cpu").model
    image = torch.rand(1, 3, 56, 84)
    for value in model.teacher.values().values():
        value += 0.1
    assert torch.equal(model.eval().teacher_tokens(image), model.teacher_tokens(image))
    assert not torch.equal(model.train().teacher_tokens(image), model.teacher_tokens(image))


# ---------------------------------------------------------------------- against forgetting


def count_passes(pipeline) -> list[int]:
    """Grows by the number of images of each pass through the backbone."""
    passes: list[int] = []
    norm = pipeline.model.student.backbone.vit.norm
    norm.register_forward_hook(lambda module, inputs, outputs: passes.append(len(inputs[0])))
    return passes


@pytest.mark.parametrize(("trains", "preserve"), [("lora", "l2"), ("full", "cosine")])
def test_the_distance_from_the_original_tokens_is_added_to_the_loss(tiny_config, preserve, trains):
    tiny_config.pipeline.model.lora.dropout = 0.3
    plain = training_of(tiny_config, trains)
    preserved = training_of(tiny_config, trains, preserve=preserve, preserve_weight=0.25)
    for pipeline in (plain, preserved):
        move_student(pipeline.model)
    passes = count_passes(plain), count_passes(preserved)
    _, without, fewer = step(plain, 3)
    _, losses, metrics = step(preserved, 3)
    assert passes == ([2, 1], [2, 1, 1])  # the teacher's contexts, the student's target, and that of the original
    assert metrics.keys() - fewer.keys() == {"preservation"} and not metrics["preservation"].requires_grad
    moved = float(metrics["preservation"])
    assert moved > 0.01 and float(losses["distillation"]) == pytest.approx(
        float(without["distillation"]) + 0.25 * moved, abs=1e-5
    )
    for name in fewer:
        assert float(metrics[name]) == pytest.approx(float(fewer[name]), abs=1e-6), name
    # by hand, in eval mode: no dropout on either side, every token of the target
    preserved.eval()
    (triplet,) = preserved.datamanager.next_train(3)
    with torch.no_grad():
        outputs = preserved.model([triplet], [preserved.geometry(triplet)])
        student = preserved.model.student_tokens(triplet.target.images)
        original = preserved.model.original_tokens(triplet.target.images)
    expected = {
        "l2": (student - original).square().mean(),
        "cosine": 1 - torch.cosine_similarity(student, original, dim=-1).mean(),
    }[preserve]
    assert float(outputs["preservation"]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_untrained_student_has_not_moved_at_any_precision(tiny_config, precision):
    pipeline = training_of(tiny_config, "full", preserve="l2", precision=precision)
    _, losses, metrics = step(pipeline)
    assert float(metrics["preservation"]) == 0
    losses["distillation"].backward()
    assert all(torch.isfinite(p.grad).all() for _, p in named_trained(pipeline.model))


def test_the_term_pulls_the_student_back_to_the_original(tiny_config):
    moved = {}
    for weight in (1e-4, 100.0):
        pipeline = training_of(tiny_config, "full", preserve="l2", preserve_weight=weight)
        move_student(pipeline.model)
        moved[weight] = [float(step(pipeline, 0)[2]["preservation"])]
        train_a_little(pipeline, steps=3, rate=5e-3)
        moved[weight].append(float(step(pipeline, 0)[2]["preservation"]))
    assert moved[100.0][0] == moved[1e-4][0] and moved[100.0][1] < 0.8 * moved[100.0][0]
    assert moved[100.0][1] < 0.8 * moved[1e-4][1]


def test_tokens_are_preserved_where_nothing_is_covered_too(tiny_config):
    pipeline = training_of(tiny_config, "blocks", preserve="l2")
    with torch.no_grad():
        pipeline.model.student.backbone.vit.norm.bias += 0.5
    (triplet,) = pipeline.datamanager.next_train(0)
    gaussians = pipeline.datamanager.reconstruct(triplet.context)
    gaussians.opacities.zero_()
    outputs = pipeline.model([triplet], [gaussians])
    assert float(outputs["loss"].detach()) == pytest.approx(0.25, abs=1e-5)  # 0.5 squared, in every channel
    outputs["loss"].backward()
    assert all(p.grad is not None for _, p in named_trained(pipeline.model))


def test_preservation_is_evaluated(tiny_config):
    pipeline = training_of(tiny_config, "lora", preserve="cosine")
    metrics, _ = pipeline.evaluate(pipeline.datamanager.eval_triplet(0, with_depth=True))
    assert metrics["preservation"] == pytest.approx(0, abs=1e-5)
    assert metrics["loss"] == pytest.approx(metrics["kl"] + metrics["teacher_entropy"], abs=1e-4)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("trains", ["lora", "blocks", "full"])
def test_a_checkpoint_holds_only_what_was_trained(tiny_config, trains):
    pipeline = training_of(tiny_config, trains)
    state = pipeline.state_dict()
    fingerprints = {"_model.base_fingerprint", "reconstructor_fingerprint"}
    assert all(key.startswith(("_model.student.", "_model.teacher.")) or key in fingerprints for key in state)
    assert any("pos_embed" in key for key in state) == (trains == "full")
    assert not any("base_layer" in key or "blocks.1.mlp" in key for key in state if trains != "full")
    trained = sum(p.numel() for p in pipeline.model.student.parameters() if p.requires_grad)
    assert sum(value.numel() for value in state.values()) == 2 * trained + 32 + 32


@pytest.mark.parametrize("trains", ["lora", "blocks", "full"])
def test_a_checkpoint_comes_back_exactly(tiny_config, trains):
    first = training_of(tiny_config, trains).eval()
    with torch.no_grad():
        for parameter in first.model.student.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    first.model.teacher.update(first.model.student, 0.3)
    second = training_of(tiny_config, trains).eval()
    second.load_pipeline({f"module.{k}".removeprefix("module."): v for k, v in first.state_dict().items()}, step=3)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    image = torch.rand(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    found = {}
    with torch.no_grad():
        for name in ("teacher_tokens", "student_tokens", "original_tokens"):
            found[name] = getattr(second.model, name)(image)
            assert torch.equal(found[name], getattr(first.model, name)(image)), name
    assert not torch.allclose(found["teacher_tokens"], found["student_tokens"], atol=1e-2)
    assert not torch.allclose(found["teacher_tokens"], found["original_tokens"], atol=1e-2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("trains full", "trains lora"),
        ("trains blocks --pipeline.model.last-blocks 2", "trains full"),
        ("trains lora", "trains blocks --pipeline.model.last-blocks 2"),
        ("trains blocks --pipeline.model.last-blocks 3", "trains blocks --pipeline.model.last-blocks 2"),
    ],
)
def test_a_checkpoint_of_which_something_else_was_trained_is_refused_in_one_sentence(tiny_config, before, after):
    pipelines = []
    for flags in (before, after):
        words = flags.split()
        pipelines.append(training_of(tiny_config, words[1], last_blocks=int(words[-1]) if len(words) > 2 else 1))
    message = f"step 7 was trained with --pipeline.model.{before}, and this model has --pipeline.model.{after}: give"
    with pytest.raises(InputError, match=message):
        pipelines[1].load_pipeline(pipelines[0].state_dict(), step=7)


@pytest.mark.parametrize("trains", ["lora", "blocks", "full"])
def test_merged_transformers_say_what_teacher_and_student_say(tiny_config, trains):
    model = training_of(tiny_config, trains).model.eval()
    move_student(model)
    model.teacher.update(model.student, 0.5)
    before = {name: value.clone() for name, value in model.student.state_dict().items()}
    image = torch.rand(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = {"teacher": model.teacher_tokens(image), "student": model.student_tokens(image)}
    assert (said["teacher"] - said["student"]).abs().max() > 1e-2
    for which, expected in said.items():
        vit = model.merged_backbone(which).vit
        fresh = build_trainable("tiny", "random", seed=0)
        assert vit.state_dict().keys() == fresh.vit.state_dict().keys()
        assert not any(p.requires_grad for p in vit.parameters())
        fresh.vit.load_state_dict(vit.state_dict(), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(fresh(image), expected, rtol=0, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.student.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("_model.student.head.mlp.0.bias"), "missing student.head.mlp.0.bias"),
        (lambda s: s.update({"_model.extra": torch.zeros(1)}), "unexpected extra"),
        (
            lambda s: s.update({"_model.student.head.mlp.0.bias": torch.zeros(3)}),
            r"has shape \(3,\), expected \(512,\)",
        ),
        (lambda s: s["_model.base_fingerprint"].add_(1), "trained on another base"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(pipeline, damage, message):
    state = {key: value.clone() for key, value in pipeline.state_dict().items()}
    damage(state)
    with pytest.raises(InputError, match=message):
        pipeline.load_pipeline(state, step=0)


def test_other_positions_mean_another_base_and_runs_from_before_the_choice_have_timms(tiny_config):
    hub = tiny_config.pipeline.setup(device="cpu")
    assert hub.model.student.backbone.positions == "hub"
    tiny_config.pipeline.model.position_embedding = "timm"
    timm = tiny_config.pipeline.setup(device="cpu")
    with pytest.raises(InputError, match="another --pipeline.model.position-embedding than timm"):
        timm.load_pipeline(hub.state_dict(), step=0)
    del vars(tiny_config.pipeline.model)["position_embedding"]  # as a config.yml of before unpickles
    old = tiny_config.pipeline.setup(device="cpu")
    old.load_pipeline(timm.state_dict(), step=0)
    assert old.model.student.backbone.positions == "timm"


def test_another_seed_means_another_random_base(tiny_config):
    state = tiny_config.pipeline.setup(device="cpu").state_dict()
    tiny_config.pipeline.seed = 43
    with pytest.raises(InputError, match="another base"):
        tiny_config.pipeline.setup(device="cpu").load_pipeline(state, step=0)


# ---------------------------------------------------------------------- viewer


@pytest.mark.parametrize(("height", "width"), [(30, 52), (512, 402), (1, 1)])
def test_outputs_have_the_cameras_size_and_are_finite(pipeline, height, width):
    outputs = pipeline.model.eval().get_outputs_for_camera(camera(height, width))
    assert list(outputs) == list(Display.CHANNELS)
    for name, channels in Display.CHANNELS.items():
        assert outputs[name].shape == (height, width, channels) and torch.isfinite(outputs[name]).all()
    for name in set(Display.CHANNELS) - {"depth"}:
        assert outputs[name].min() >= 0 and outputs[name].max() <= 1 + 1e-5


def test_the_outputs_at_the_target_camera_show_the_target(pipeline):
    data = pipeline.datamanager
    target = data.shown_triplet.target
    pose = target.camera_to_worlds[0, :3].clone()
    pose[:, 1:] *= torch.tensor([-1.0, -1.0, 1.0])  # nerfstudio's axes
    k = target.intrinsics[0]
    view = Cameras(pose[None], fx=k[0, 0], fy=k[1, 1], cx=k[0, 2], cy=k[1, 2], height=56, width=84)
    torch.testing.assert_close(to_pinhole(view).camera_to_world, target.camera_to_worlds[0])
    outputs = pipeline.model.eval().get_outputs_for_camera(view)
    assert (outputs["rgb"] - target.images[0].permute(1, 2, 0)).abs().mean() < 0.06
    # nerfstudio measures depth along the ray: longer than along the axis, most of all in the corners
    z = outputs["depth"][..., 0] / ((view.generate_rays(camera_indices=0).metadata["directions_norm"])[..., 0])
    depth_from_file = data.shown_triplet.context.depths
    assert depth_from_file.min() * 0.5 < z.median() < depth_from_file.max()
    assert outputs["splatted_pca"].flatten(0, 1).std(0).min() > 0.02


def test_a_failing_render_gives_grey_pictures_and_one_line_in_the_log(pipeline, capsys):
    pipeline.model.eval()
    healthy = pipeline.model.display.scene
    pipeline.model.display.scene = None
    for _ in range(3):
        outputs = pipeline.model.get_outputs_for_camera(camera(6, 8))
        assert all((value == 0.5).all() for value in outputs.values())
    assert capsys.readouterr().out.count("Rendering failed") == 1
    pipeline.model.display.scene = healthy
    assert not (pipeline.model.get_outputs_for_camera(camera(6, 8))["rgb"] == 0.5).all()


def test_an_interrupted_render_is_passed_on_and_leaves_the_caches_whole(pipeline, monkeypatch):
    from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException

    model = pipeline.model.eval()

    def interrupted(images):
        raise IOChangeException

    monkeypatch.setitem(model.display._backbones, "teacher", interrupted)
    with pytest.raises(IOChangeException):
        model.get_outputs_for_camera(camera(6, 8))
    monkeypatch.undo()
    assert torch.isfinite(model.get_outputs_for_camera(camera(6, 8))["splatted_pca"]).all()


def train_a_little(pipeline, steps=3, rate=1e-2):
    parameters = [p for p in pipeline.model.student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for number in range(steps):
        optimizer.zero_grad()
        step(pipeline, number)[1]["distillation"].backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("trains", "patch_embed"), [("lora", False), ("lora", True), ("blocks", False), ("full", False)]
)
def test_original_tokens_are_those_of_the_backbone_before_whatever_was_trained(tiny_config, trains, patch_embed):
    tiny_config.pipeline.model.lora.dropout = 0.3
    pipeline = training_of(tiny_config, trains, lora_patch_embed=patch_embed)
    model, config = pipeline.model, pipeline.config
    train_a_little(pipeline)
    image = torch.rand(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    fresh = build_trainable(config.model.backbone, config.model.weights, config.seed)
    with torch.no_grad():
        expected = fresh(image)
    before = {name: (p, p.detach().clone(), p.grad.clone()) for name, p in named_trained(model)}
    modes = [module.training for module in model.student.modules()]
    states = peft_state(model)
    assert bool(states) == (trains == "lora")
    found = model.original_tokens(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not found.requires_grad and torch.equal(found, model.original_tokens(image))
    for name, parameter in named_trained(model):
        object_before, value, gradient = before.pop(name)
        assert parameter is object_before and torch.equal(parameter, value) and torch.equal(parameter.grad, gradient)
    assert not before and modes == [module.training for module in model.student.modules()]
    assert peft_state(model) == states and all(modes)
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(model.student_tokens(image), expected, atol=1e-2)  # it was trained


def move_student(model, by=0.05):
    """Add noise to everything that is trained, the same for the same names."""
    with torch.no_grad():
        for name, parameter in named_trained(model):
            parameter += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))


def named_trained(model):
    return [(name, p) for name, p in model.student.named_parameters() if p.requires_grad]


def peft_state(model):
    """Which adapters are active, merged or switched off, layer by layer."""
    layers = [module for module in model.student.modules() if hasattr(module, "lora_A")]
    return [(layer.active_adapters, layer.merged_adapters, layer.disable_adapters) for layer in layers]


@pytest.mark.parametrize("trains", ["lora", "blocks", "full"])
def test_after_training_student_teacher_and_original_are_shown_as_three_different_things(tiny_config, trains):
    pipeline = training_of(tiny_config, trains)
    model, display = pipeline.model, pipeline.model.display
    train_a_little(pipeline)
    model.teacher.update(model.student, 0.5)
    display.changed()
    model.eval()
    pictures = {}
    for name in ("teacher", "student", "original"):
        display.choose(name)
        pictures[name] = model.get_outputs_for_camera(camera(20, 30, shown_pose(pipeline)))["splatted_pca"]
    for first, second in (("teacher", "student"), ("teacher", "original"), ("student", "original")):
        assert (pictures[first] - pictures[second]).abs().max() > 0.02, (first, second)


def shown_pose(pipeline):
    """The shown target's pose with nerfstudio's axes."""
    pose = pipeline.datamanager.shown_triplet.target.camera_to_worlds[0, :3].clone()
    pose[:, 1:3] *= -1
    return pose[None]


@pytest.mark.parametrize("loss", ["dino", "cosine", "mse"])
def test_what_each_token_adds_to_the_loss_has_the_loss_as_its_mean(tiny_config, loss):
    tiny_config.pipeline.model.loss = loss
    pipeline = tiny_config.pipeline.setup(device="cpu").train()
    train_a_little(pipeline)
    model = pipeline.model.eval()
    channels = model.student.backbone.channels
    generator = torch.Generator().manual_seed(0)
    predicted, wanted = (torch.randn(17, channels, generator=generator) for _ in range(2))
    errors = model.token_errors(predicted, wanted)
    with torch.no_grad():
        compared = model._compare(predicted, wanted)
    assert errors.shape == (17,) and not errors.requires_grad
    expected = compared["kl"] if loss == "dino" else compared["loss"]
    assert float(errors.mean()) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    alone = torch.stack([model.token_errors(predicted[i : i + 1], wanted[i : i + 1])[0] for i in range(17)])
    torch.testing.assert_close(errors, alone, rtol=1e-4, atol=1e-6)


PICTURED = ["target", "instance masks", "splatted features", "blended features", "target tokens", "student tokens"]


@pytest.mark.parametrize("loss", ["dino", "cosine", "mse"])
def test_a_triplet_s_pictures_show_its_way_through_the_method(tiny_config, loss):
    tiny_config.pipeline.model.loss = loss
    pipeline = tiny_config.pipeline.setup(device="cpu").eval()
    triplet = pipeline.datamanager.eval_triplet(0)
    gaussians = pipeline.datamanager.reconstruct(triplet.context)
    basis = pipeline.model.display.basis()
    pictures = pipeline.model.pictures(triplet, gaussians)
    *names, last = pictures
    assert names == PICTURED and last.startswith("loss per token, 0 to ")
    for name, picture in pictures.items():
        assert picture.shape == (56, 84, 3) and torch.isfinite(picture).all(), name
        assert picture.min() >= 0 and picture.max() <= 1 + 1e-6 and picture.std() > 0.02, name
    assert torch.equal(pictures["target"], triplet.target.images[0].permute(1, 2, 0))
    assert pipeline.model.display.basis() is basis
    assert pipeline.model.display.scene.triplet.scene == "room_0000" != triplet.scene  # what is shown is another
    # flat squares of 14 pixels, in the colours of the tokens
    with torch.no_grad():
        tokens = pipeline.model.student_tokens(triplet.target.images)[0]
    colours = basis.colour(basis.project(tokens))
    torch.testing.assert_close(pictures["student tokens"][7::14, 7::14], colours, rtol=0, atol=1e-5)
    assert torch.equal(pictures["student tokens"][:14, :14], colours[0, 0].expand(14, 14, 3))


@pytest.mark.parametrize("loss", ["dino", "cosine", "mse"])
def test_a_triplet_s_pictures_are_finite_where_no_token_is_covered(tiny_config, loss):
    tiny_config.pipeline.model.loss = loss
    pipeline = tiny_config.pipeline.setup(device="cpu").eval()
    triplet = pipeline.datamanager.eval_triplet(0)
    gaussians = pipeline.datamanager.reconstruct(triplet.context)
    gaussians.opacities.zero_()
    pictures = pipeline.model.pictures(triplet, gaussians)
    assert len(pictures) == 7 and all(torch.isfinite(picture).all() for picture in pictures.values())
    for name in ("splatted features", "blended features", "target tokens"):
        assert (pictures[name] == 0).all(), name
    (errors,) = (picture for name, picture in pictures.items() if name.startswith("loss per token"))
    assert (errors == errors[0, 0]).all() and errors.std(-1).max() == 0  # all grey


def test_without_masks_a_triplet_s_pictures_have_none(tiny_config):
    tiny_config.pipeline.datamanager.masks = "none"
    pipeline = tiny_config.pipeline.setup(device="cpu").eval()
    triplet = pipeline.datamanager.eval_triplet(0)
    pictures = pipeline.model.pictures(triplet, pipeline.datamanager.reconstruct(triplet.context))
    assert [*pictures][:-1] == [name for name in PICTURED if name != "instance masks"]
    assert torch.equal(pictures["splatted features"], pictures["blended features"])


# ---------------------------------------------------------------------- identity check


def test_on_rooms_a_view_splatted_onto_itself_returns_the_teachers_tokens(tiny_config, tmp_path):
    """One context equals the target and the depth is exact: what comes back is what went in, up to resampling.

    Upsampling and pooling alone smooth random tokens (to a cosine of about 0.93), so that is what splatting, which
    comes between the two, is compared with.
    """
    folder = generate_rooms(RoomsConfig(out=tmp_path / "rooms", scenes=2, seed=3, height=112, width=168, frames=12))
    tiny_config.pipeline.datamanager.data = folder
    tiny_config.pipeline.datamanager.image_size = (112, 168)
    tiny_config.pipeline.datamanager.target_view = "context"
    tiny_config.pipeline.datamanager.min_context_gap = 4
    tiny_config.pipeline.datamanager.max_context_gap = 6
    tiny_config.pipeline.model.supervision.blending = 1.0
    pipeline = tiny_config.pipeline.setup(device="cpu")
    settings = pipeline.model.config.supervision.settings()
    for number in range(3):
        pair = pipeline.datamanager.eval_triplet(number)
        same = pair.context.names.index(pair.target.names[0])
        alone = {name: value[same : same + 1] for name, value in vars(pair.context).items() if torch.is_tensor(value)}
        tokens = pipeline.model.teacher_tokens(pair.target.images)[0]
        resampled = pool(upsample(tokens, pair.target.mask(0), (112, 168), settings), 8, 12)
        mean = tokens.flatten(0, 1).mean(0)
        # random tokens share a large mean, which alone would give a high cosine: the rest must agree too
        similarities = {}
        for name, triplet in (("alone", replace(pair, context=replace(pair.context, **alone))), ("with another", pair)):
            result = pipeline.model.supervise(triplet, pipeline.datamanager.reconstruct(triplet.context))
            whole = torch.cosine_similarity(result.tokens, resampled, dim=-1).mean()
            rest = torch.cosine_similarity(result.tokens - mean, resampled - mean, dim=-1).mean()
            similarities[name] = (float(whole), float(rest))
        print("splatted onto itself, cosine and cosine without the mean token:", similarities)
        assert min(similarities["alone"]) > 0.98
        # the second context sees the same surfaces under its own patch grid, and a random ViT is not consistent
        assert min(similarities["with another"]) > 0.85


# ---------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.model, "weights", "/nowhere.pth"), "/nowhere.pth: no such file"),
        (lambda c: setattr(c.model, "backbone", "resnet"), "Unknown backbone"),
        (lambda c: setattr(c.model, "ema_momentum", 1.5), "ema-momentum"),
        (lambda c: setattr(c.model, "ema_every", 0), "ema-every"),
        (lambda c: setattr(c.model, "teacher_temperature", 0.0), "temperature"),
        (lambda c: vars(c.model).update(trains="blocks", last_blocks=5), "last-blocks 5 must be from 1 to 4"),
        (lambda c: setattr(c.model, "preserve_weight", 0.0), "preserve-weight 0.0 must be positive"),
        (lambda c: setattr(c.model, "preserve_weight", float("nan")), "preserve-weight nan must be positive"),
        (lambda c: setattr(c.model.head, "form", "cubic"), "head.form cubic"),
        (lambda c: setattr(c.model.head, "max_logits", 0), "head.max-logits 0"),
        (lambda c: setattr(c.model.supervision, "blending", 2.0), "blending"),
        (lambda c: setattr(c.datamanager, "max_context_gap", 3), "max-context-gap"),
    ],
)
def test_a_senseless_setting_is_refused_before_training(tiny_config, change, message):
    change(tiny_config.pipeline)
    with pytest.raises(InputError, match=message):
        tiny_config.pipeline.setup(device="cpu")
