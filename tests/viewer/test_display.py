import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException

from snd_nerfstudio.splatting import PinholeCamera, rasterize
from snd_nerfstudio.supervision.dense import dense_supervision, lift
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.display import Display
from snd_nerfstudio.viewer.guarded import blank_outputs
from snd_nerfstudio.viewer.outputs import EMPTY, target_pixels, without_gaps
from snd_nerfstudio.viewer.pca import fit_pca
from snd_nerfstudio.viewer.pictures import enlarge
from tests.viewer.test_outputs import moved, picture, room, seen_from, with_a_hole

CPU = torch.device("cpu")
THREE_CHANNELS = {name for name, count in Display.CHANNELS.items() if count == 3}


class Patches:
    """Tokens of 4 x 4 pixels: a convolution with random weights, which may change as if it were trained."""

    def __init__(self, seed, channels=8):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(channels, 3, 4, 4, generator=generator)
        self.calls = 0
        self.interrupt_at = None

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise IOChangeException
        return F.conv2d(images, self.weight, stride=4).permute(0, 2, 3, 1).contiguous()


def dense(scene, tokens, settings, camera=None):
    """Splatted tokens without blending, step by step."""
    context, target = scene.triplet.context, scene.triplet.target
    camera = target.camera(0) if camera is None else camera
    return dense_supervision(
        tokens, context.masks, (28, 40), scene.gaussians, camera, None, replace(settings, blending=1.0)
    )


def shown(scene=None, settings=None, student=None):
    """A display of a scene, with its three backbones."""
    scene, settings = room() if scene is None else scene, SupervisionSettings() if settings is None else settings
    backbones = {"teacher": Patches(1), "student": Patches(2) if student is None else student, "original": Patches(3)}

    def target_tokens(triplet, gaussians):
        context = triplet.context
        found = dense_supervision(
            backbones["teacher"](context.images), context.masks, (28, 40), gaussians, triplet.target.camera(0),
            triplet.target.mask(0), settings,
        )  # fmt: skip
        return found.tokens, found.coverage > 0.5

    display = Display(backbones, target_tokens, settings)
    display.show(scene.triplet, scene.gaussians)
    return display, scene, backbones


def at_target(scene, height=28, width=40):
    """The target's camera, with more or fewer pixels."""
    camera = scene.triplet.target.camera(0)
    scale = torch.tensor([width / 40, height / 28, 1.0])
    return PinholeCamera(camera.camera_to_world, camera.intrinsics * scale[:, None], height, width)


def elsewhere(scene, height=28, width=40):
    return moved(at_target(scene, height, width), x=0.2, y=-0.1, z=-0.3)


def lifted(scene, values, settings):
    return lift(values, scene.triplet.context.masks, (28, 40), settings).features


def splatted(scene, camera, values):
    """Means of values of all Gaussians, and the coverage."""
    splat = rasterize(without_gaps(scene, camera), camera, values)
    alpha = splat.alpha[..., None]
    return splat.features / alpha.clamp(min=EMPTY), alpha


def assert_same(found, expected, rtol=0.0, atol=1e-5):
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------- any camera, any choice of outputs


@pytest.mark.parametrize(("height", "width"), [(1, 1), (28, 40), (7, 190), (61, 33)])
@pytest.mark.parametrize("opacity", [0.0, 0.5])
@pytest.mark.parametrize("sees", ["rendered view", "target image"])
def test_every_output_has_the_cameras_size_is_finite_and_is_the_same_alone(height, width, opacity, sees):
    display, scene, _ = shown(with_a_hole(room()))
    display.mask_opacity, display.student_sees = opacity, sees
    camera = elsewhere(scene, height, width)
    middle = (scene.gaussians.means[:, 0].median(), torch.tensor(0.0))
    display.click(camera.camera_to_world[:3, 3], torch.tensor([float(middle[0]), 0.3, 3.0]))
    together = display.render(camera, CPU)
    assert list(together) == list(Display.CHANNELS)
    for name, channels in Display.CHANNELS.items():
        assert together[name].shape == (height, width, channels), name
        assert torch.isfinite(together[name]).all(), name
        if name != "depth":
            assert together[name].min() >= 0 and together[name].max() <= 1 + 1e-5, name
    grey = blank_outputs(Display.CHANNELS, height, width, CPU)
    for name in Display.CHANNELS:
        display.wanted = lambda wanted=name: {wanted}
        assert_same(display.render(camera, CPU), {**grey, name: together[name]})


def test_with_nothing_there_every_output_is_finite_and_dark():
    scene = room()
    scene = replace(scene, gaussians=replace(scene.gaussians, opacities=torch.zeros(len(scene.gaussians))))
    for sees in ("rendered view", "target image"):
        display, _, _ = shown(scene)
        display.student_sees = sees
        outputs = display.render(elsewhere(scene), CPU)
        assert all(torch.isfinite(value).all() for value in outputs.values())
        for name in ("rgb", "accumulation", "splatted_pca", "cosine_error", "similarity", "clusters"):
            assert (outputs[name] == 0).all(), name


def test_only_what_is_wanted_is_computed():
    display, scene, backbones = shown()
    display.wanted = lambda: {"rgb", "depth", "accumulation"}
    outputs = display.render(at_target(scene), CPU)
    assert all(backbone.calls == 0 for backbone in backbones.values())
    truth = scene.triplet.target.images[0].permute(1, 2, 0)
    assert (outputs["rgb"] - truth)[4:-4, 4:-4].abs().mean() < 0.05


def test_tokens_are_computed_once_until_they_change():
    display, scene, backbones = shown()
    display.wanted = lambda: {"splatted_pca", "blended_pca", "clusters"}
    first = display.render(at_target(scene), CPU)
    calls = backbones["teacher"].calls
    assert_same(display.render(at_target(scene), CPU), first, atol=0.0)
    assert backbones["teacher"].calls == calls
    backbones["teacher"].weight += 0.5
    assert_same(display.render(at_target(scene), CPU), first, atol=0.0)
    display.changed()
    assert not torch.allclose(display.render(at_target(scene), CPU)["splatted_pca"], first["splatted_pca"], atol=0.05)
    assert backbones["teacher"].calls > calls


def test_before_anything_is_shown_the_pictures_are_grey(capsys):
    display, scene, _ = shown()
    display.scene = None
    assert all((value == 0.5).all() for value in display.render(at_target(scene), CPU).values())
    assert "no triplet is shown yet" in capsys.readouterr().out


# ---------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    ("backbone", "call"), [("teacher", 1), ("teacher", 2), ("teacher", 3), ("student", 1), ("student", 2)]
)
def test_interrupted_tokens_are_computed_again(backbone, call):
    display, scene, _ = shown()
    expected = display.render(elsewhere(scene), CPU)
    display, scene, backbones = shown()
    backbones[backbone].interrupt_at = call
    reports = []
    display.report = reports.append
    with pytest.raises(IOChangeException):
        display.render(elsewhere(scene), CPU)
    assert_same(display.render(elsewhere(scene), CPU), expected)
    assert reports == []


def interrupted(function, line):
    """Call a function, and raise as nerfstudio does at the given line that is run in the display's file.

    Returns:
        Whether it got to the end.
    """
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if not frame.f_code.co_filename.endswith("viewer/display.py"):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise IOChangeException
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except IOChangeException:
        return False
    finally:
        sys.settrace(before)
    return True


def test_a_render_that_is_interrupted_between_any_two_lines_leaves_the_display_usable():
    def ready():
        display, scene, backbones = shown()
        display.cluster_count, display.follow, display.mask_opacity = 2, True, 0.5
        display.render(at_target(scene, 2, 3), CPU)
        for backbone in backbones.values():
            backbone.weight *= 1.3
        display.changed()
        return display, elsewhere(scene, 6, 9)

    display, camera = ready()
    expected = display.render(camera, CPU)
    line, finished = 1, False
    while not finished and line < 500:
        display, camera = ready()
        finished = interrupted(lambda d=display, c=camera: d.render(c, CPU), line)
        assert_same(display.render(camera, CPU), expected)
        line += 9
    assert finished and line > 60


# ---------------------------------------------------------------------- slow twins


@pytest.mark.parametrize("features_of", ["teacher", "student", "original"])
@pytest.mark.parametrize("place", [at_target, elsewhere])
def test_splatted_pca_is_what_splatting_all_channels_and_projecting_then_gives(place, features_of):
    display, scene, backbones = shown(with_a_hole(room()))
    display.choose(features_of)
    camera = place(scene, 42, 60)
    tokens = backbones[features_of](scene.triplet.context.images)
    mean, alpha = splatted(scene, camera, lifted(scene, tokens, display.settings))
    expected = display.basis().colour(display.basis().project(mean)) * alpha
    found = display.render(camera, CPU)["splatted_pca"]
    covered = (alpha > EMPTY).expand_as(found)
    torch.testing.assert_close(found[covered], expected[covered], rtol=0, atol=1e-4)
    assert (found[~covered] <= EMPTY).all() and expected[covered].std() > 0.1


@pytest.mark.parametrize("count", [2, 8])
def test_clusters_are_those_of_the_largest_splatted_score(count):
    display, scene, backbones = shown()
    display.cluster_count = count
    camera = elsewhere(scene, 42, 60)
    directions = F.normalize(backbones["teacher"](scene.triplet.context.images), dim=-1)
    mean, alpha = splatted(scene, camera, lifted(scene, directions, display.settings))
    clusters = display.clusters()
    labels = (mean @ clusters.centres.T).argmax(-1)
    assert len(clusters.centres) == count and len(labels.unique()) > 1
    found, expected = display.render(camera, CPU)["clusters"], clusters.colour(labels) * alpha
    equal = ((found - expected).abs().amax(-1) < 1e-4) | (alpha[..., 0] <= EMPTY)
    assert equal.float().mean() > 0.999


def test_similarity_is_the_splatted_cosine_to_the_clicked_point_and_nothing_without_one():
    display, scene, backbones = shown()
    camera = at_target(scene)
    assert (display.render(camera, CPU)["similarity"] == 0).all()
    display.click(camera.camera_to_world[:3, 3], torch.tensor([0.0, 0.0, 1.0]))
    directions = F.normalize(backbones["teacher"](scene.triplet.context.images), dim=-1)
    cosines = (directions @ F.normalize(display.picked.feature, dim=0))[..., None]
    mean, alpha = splatted(scene, camera, lifted(scene, cosines, display.settings))
    found = display.render(camera, CPU)["similarity"]
    torch.testing.assert_close(found, mean.clamp(0, 1) * alpha, rtol=0, atol=1e-5)
    assert found[14, 20] > 0.9 and found.std() > 0.05
    display.click(camera.camera_to_world[:3, 3], torch.tensor([-0.35, 0.1, 1.0]))
    other = display.render(camera, CPU)["similarity"]
    assert other[18, 6] > 0.9 and not torch.allclose(other, found, atol=0.05)
    display.forget_point()
    assert (display.render(camera, CPU)["similarity"] == 0).all()


@pytest.mark.parametrize("weighting", ["coverage", "none"])
@pytest.mark.parametrize("blending", [0.0, 0.5, 1.0])
def test_blended_pca_at_the_target_is_the_dense_supervision_s(weighting, blending):
    display, scene, backbones = shown(settings=SupervisionSettings(weighting=weighting))
    display.blending = blending
    context, target = scene.triplet.context, scene.triplet.target
    slow = dense_supervision(
        backbones["teacher"](context.images), context.masks, (28, 40), scene.gaussians, target.camera(0),
        target.mask(0), replace(display.settings, blending=blending),
    )  # fmt: skip
    basis, alpha = display.basis(), slow.alpha[..., None]
    expected = basis.colour(basis.project(slow.blended))
    if weighting == "coverage":
        expected = basis.colour(basis.project(slow.blended / alpha.clamp(min=EMPTY))) * alpha
    found = display.render(at_target(scene), CPU)["blended_pca"]
    covered = (alpha > 0.02).expand_as(found)
    assert covered.float().mean() > 0.9
    torch.testing.assert_close(found[covered], expected[covered], rtol=0, atol=1e-4)
    if blending == 0 and weighting == "coverage":  # one colour a region
        inside = (target.masks[0] == 2) & (slow.alpha > 0.999)
        assert inside.sum() > 50 and found[inside].std(0).max() < 1e-3


def test_blended_pca_from_elsewhere_is_that_of_the_target_on_the_same_surface():
    display, scene, _ = shown()
    camera = elsewhere(scene, 42, 60)
    pixels = target_pixels(scene, camera, rasterize(without_gaps(scene, camera), camera, torch.zeros(2240, 0)))
    found = display.render(camera, CPU)["blended_pca"]
    torch.testing.assert_close(found, pixels.take(display.blended_target()), rtol=0, atol=1e-5)
    assert 0.3 < pixels.seen.float().mean() < 1 and (found[~pixels.seen] == 0).all()


# ---------------------------------------------------------------------- the student


def test_on_the_target_image_the_student_s_tokens_are_those_of_the_photograph():
    scene = room()
    photograph = replace(scene.triplet.target, images=picture().permute(2, 0, 1)[None])  # not what is rendered
    scene = replace(scene, triplet=replace(scene.triplet, target=photograph))
    display, _, backbones = shown(scene)
    display.student_sees = "target image"
    basis = display.basis()
    tokens = backbones["student"](photograph.images)[0]
    found = display.render(at_target(scene), CPU)["student_pca"]
    torch.testing.assert_close(found, enlarge(basis.colour(basis.project(tokens)), (28, 40)), rtol=0, atol=1e-5)
    display.student_sees = "rendered view"
    outputs = display.render(at_target(scene, 56, 80), CPU)
    seen = F.interpolate(outputs["rgb"].permute(2, 0, 1)[None], size=(28, 40), mode="bilinear", antialias=True)
    tokens = backbones["student"](seen)[0]
    expected = enlarge(basis.colour(basis.project(tokens)), (56, 80))
    torch.testing.assert_close(outputs["student_pca"], expected, rtol=0, atol=1e-4)


def test_the_cosine_error_of_a_student_that_predicts_the_splatted_tokens_is_zero():
    scene = with_a_hole(room())
    settings = SupervisionSettings()
    tokens = dense(scene, Patches(1)(scene.triplet.context.images), settings).tokens
    display, _, _ = shown(scene, settings, student=lambda images: 3.0 * tokens[None])
    display.student_sees = "target image"
    assert display.render(at_target(scene), CPU)["cosine_error"].abs().max() < 1e-5
    display.choose("original")  # which it does not predict
    assert display.render(at_target(scene), CPU)["cosine_error"].max() > 0.1


@pytest.mark.parametrize("weighting", ["coverage", "none"])
@pytest.mark.parametrize("sees", ["rendered view", "target image"])
def test_the_cosine_error_is_that_of_the_densely_splatted_tokens(sees, weighting):
    display, scene, backbones = shown(with_a_hole(room()), SupervisionSettings(weighting=weighting))
    display.student_sees = sees
    camera = elsewhere(scene, 56, 80) if sees == "rendered view" else at_target(scene, 56, 80)
    outputs = display.render(camera, CPU)
    image, view = scene.triplet.target.images, scene.triplet.target.camera(0)
    if sees == "rendered view":
        image = F.interpolate(outputs["rgb"].permute(2, 0, 1)[None], size=(28, 40), mode="bilinear", antialias=True)
        view = elsewhere(scene)
    slow = dense(scene, backbones["teacher"](scene.triplet.context.images), display.settings, view)
    error = 1 - F.cosine_similarity(slow.tokens, backbones["student"](image)[0], dim=-1)
    error = torch.where(slow.coverage > EMPTY, error.clamp(0, 1), 0.0)
    expected = enlarge(error[..., None], (56, 80))
    torch.testing.assert_close(outputs["cosine_error"], expected, rtol=0, atol=1e-4)
    assert (slow.coverage <= EMPTY).any() and error.std() > 0.05


# ---------------------------------------------------------------------- mask overlay


@pytest.mark.parametrize("place", [at_target, elsewhere])
def test_the_mask_overlay_is_on_coloured_outputs_where_the_target_sees(place):
    display, scene, _ = shown()
    camera = place(scene, 42, 60)
    plain = display.render(camera, CPU)
    display.mask_opacity = 0.6
    covered = display.render(camera, CPU)
    pixels = target_pixels(scene, camera, rasterize(without_gaps(scene, camera), camera, torch.zeros(2240, 0)))
    labelled = pixels.take_labels(scene.triplet.target.masks[0]) > 0
    assert 0.3 < labelled.float().mean() < 1
    for name in Display.CHANNELS:
        changed = (covered[name] != plain[name]).any(-1)
        if name in THREE_CHANNELS:
            assert not changed[~labelled].any() and changed[labelled].float().mean() > 0.95, name
        else:
            assert not changed.any(), name


def test_without_masks_there_is_no_overlay():
    scene = room()
    target = replace(scene.triplet.target, masks=None)
    display, scene, _ = shown(replace(scene, triplet=replace(scene.triplet, target=target)))
    plain = display.render(at_target(scene), CPU)
    display.mask_opacity = 0.6
    assert_same(display.render(at_target(scene), CPU), plain, atol=0.0)


# ---------------------------------------------------------------------- colours, clusters, backbones


def joint_features(scene, backbones, settings):
    context, target = scene.triplet.context, scene.triplet.target
    teacher, student = backbones["teacher"](context.images), backbones["student"](target.images)
    wanted = dense_supervision(
        teacher, context.masks, (28, 40), scene.gaussians, target.camera(0), target.mask(0), settings
    )
    return torch.cat([teacher.flatten(0, 2), student.flatten(0, 2), wanted.tokens[wanted.coverage > 0.5]])


def test_colours_stay_while_the_features_change_and_are_fitted_anew_when_asked_for():
    display, scene, backbones = shown()
    display.render(at_target(scene), CPU)
    basis, clusters = display.basis(), display.clusters()
    torch.testing.assert_close(vars(basis), vars(fit_pca(joint_features(scene, backbones, display.settings))))
    backbones["teacher"].weight *= 2
    display.changed()
    display.render(at_target(scene), CPU)
    assert display.basis() is basis and display.clusters() is clusters
    display.refit()
    display.render(at_target(scene), CPU)
    fitted = display.basis()
    torch.testing.assert_close(vars(fitted), vars(fit_pca(joint_features(scene, backbones, display.settings))))
    assert not torch.allclose(fitted.mean, basis.mean) and display.clusters() is not clusters


def test_colours_that_follow_move_a_little_once_for_every_change():
    display, scene, backbones = shown()
    display.follow = True
    display.render(at_target(scene), CPU)
    old = display.basis()
    display.render(at_target(scene), CPU)
    assert display.basis() is old
    backbones["teacher"].weight *= 2
    display.changed()
    outputs = display.render(at_target(scene), CPU)
    new, goal = display.basis(), fit_pca(joint_features(scene, backbones, display.settings))
    torch.testing.assert_close(new.mean, 0.9 * old.mean + 0.1 * goal.mean, rtol=1e-4, atol=1e-5)
    display.render(at_target(scene), CPU)
    assert display.basis() is new
    mean, alpha = splatted(
        scene, at_target(scene), lifted(scene, backbones["teacher"](scene.triplet.context.images), display.settings)
    )
    expected = new.colour(new.project(mean)) * alpha
    torch.testing.assert_close(outputs["splatted_pca"], expected, rtol=0, atol=2e-3)


def test_colours_that_begin_to_follow_late_are_those_of_all_outputs():
    display, scene, backbones = shown()
    display.render(at_target(scene), CPU)
    backbones["teacher"].weight *= 2
    display.changed()
    display.render(at_target(scene), CPU)
    display.follow = True
    outputs = display.render(at_target(scene), CPU)
    display._remembered = {}
    assert_same(display.render(at_target(scene), CPU), outputs)


def test_colours_that_do_not_follow_any_more_stay():
    display, scene, backbones = shown()
    display.follow = True
    display.render(at_target(scene), CPU)
    display.follow = False
    basis = display.basis()
    backbones["teacher"].weight *= 2
    display.changed()
    display.render(at_target(scene), CPU)
    assert display.basis() is basis


def test_another_triplet_is_shown_in_the_same_colours_without_the_clicked_point():
    display, scene, _ = shown()
    display.click(torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))
    before, basis = display.render(at_target(scene), CPU), display.basis()
    assert display.picked is not None
    other = with_a_hole(room())
    display.show(other.triplet, other.gaussians)
    after = display.render(at_target(scene), CPU)
    assert display.basis() is basis and display.picked is None and (after["similarity"] == 0).all()
    assert not torch.allclose(after["splatted_pca"], before["splatted_pca"], atol=0.05)


def test_the_chosen_backbone_is_the_one_that_is_splatted_in_the_same_colours():
    display, scene, _ = shown()
    teacher = display.render(at_target(scene), CPU)
    basis = display.basis()
    display.choose("original")
    original = display.render(at_target(scene), CPU)
    assert display.basis() is basis
    for name in ("splatted_pca", "blended_pca", "cosine_error"):
        assert not torch.allclose(original[name], teacher[name], atol=0.02), name
    assert torch.equal(original["student_pca"], teacher["student_pca"])
    display.choose("teacher")
    assert_same(display.render(at_target(scene), CPU), teacher)


def test_an_unknown_backbone_is_refused_and_changes_nothing():
    display, scene, _ = shown()
    before = display.render(at_target(scene), CPU)
    with pytest.raises(ValueError, match="unknown backbone 'dino'; choose one of teacher, student, original"):
        display.choose("dino")
    assert display.features_of == "teacher"
    assert_same(display.render(at_target(scene), CPU), before, atol=0.0)


def test_another_number_of_clusters_is_fitted_anew_and_nothing_else():
    display, scene, _ = shown()
    before, clusters, basis = display.render(at_target(scene), CPU), display.clusters(), display.basis()
    display.cluster_count = 3
    display.forget_clusters()
    after = display.render(at_target(scene), CPU)
    assert len(display.clusters().centres) == 3 and display.clusters() is not clusters and display.basis() is basis
    assert len(after["clusters"][seen_from(scene, at_target(scene)).alpha > 0.9].unique(dim=0)) >= 3
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"clusters"}


def test_a_click_finds_its_matches_in_all_three_views_and_one_into_the_void_none():
    display, scene, _ = shown()
    origin = scene.triplet.target.camera_to_worlds[0, :3, 3]
    matches = display.click(origin, torch.tensor([0.0, 0.0, 2.0]))
    assert [match.view for match in matches] == ["context 1", "context 2", "target"]
    torch.testing.assert_close(display.picked.point, torch.tensor([0.0, 0.0, 1.5]), rtol=0, atol=0.02)
    assert len(display.matches()) == 3
    assert display.click(origin, torch.tensor([0.0, 0.0, -1.0])) == [] == display.matches()
    assert display.picked is None and (display.render(at_target(scene), CPU)["similarity"] == 0).all()
