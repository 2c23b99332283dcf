import dataclasses
import json

import pytest
from reference_files import load_reference

from toco_core.config import (
    RECIPES,
    ReleaseBehaviour,
    TrainConfig,
    changed_batch,
    coco,
    configured,
    field_sections,
    lr_at,
    override,
    photographs,
    shortened,
    tiny,
    voc,
)
from toco_core.config.parameters import named_values
from toco_core.errors import ToCoError
from toco_core.objective import PAPER, term_weights

VOC = {
    "model": {
        "backbone": "deit_base_patch16_224",
        "weights": None,
        "pretrained": True,
        "layer": 10,
        "aux_norm": False,
        "pooling": "max",
        "aux_pooling": None,
        "proj_hidden": 2048,
        "proj_bottleneck": 256,
        "proj_dim": 1024,
        "decoder_width": 512,
        "decoder_dilation": 5,
        "pos_embed_antialias": False,
        "freeze_pos_embed": True,
        "mean": None,
        "std": None,
    },
    "labels": {
        "beta_l": 0.25,
        "beta_h": 0.7,
        "beta": 0.5,
        "cam_scales": [1.0, 0.5, 1.5],
        "attention_steps": 0,
        "attention_blocks": [9, 10, 11, 12],
        "attention_kind": "attention",
        "par_iterations": 10,
        "par_dilations": [1, 2, 4, 8, 12, 24],
        "par_scale": 0.5,
        "refiner": "par",
    },
    "loss": {
        "cls": 1.0,
        "aux_cls": 1.0,
        "ptc": 0.2,
        "ctc": 0.5,
        "seg": 0.1,
        "energy": 0.05,
        "temperature": 0.5,
        "ctc_cosine": False,
        "ctc_batch_negatives": False,
        "ctc_whole_teacher": False,
        "ptc_start": 0,
        "ctc_start": 0,
        "seg_start": 2001,
        "energy_start": 2001,
        "exchange": 0.0,
        "exchange_start": 0,
        "consistency": 0.0,
        "consistency_start": 0,
        "prototypes": 0.0,
        "prototypes_start": 0,
        "discrepancy": 0.0,
        "discrepancy_start": 0,
        "frequency": 0.0,
        "frequency_start": 0,
        "reliable": 0.0,
        "reliable_start": 0,
        "final_cam_start": 0,
    },
    "crops": {"n_local": 8, "local_size": 96, "local_resized": False, "positive_threshold": 0.2},
    "data": {
        "dataset": "VOCdevkit/VOC2012",
        "train_split": "train_aug",
        "val_split": "val",
        "crop_size": 448,
        "scale_range": [0.5, 2.0],
        "scale_relative": False,
        "views_per_image": 0,
        "blur_sigma": [0.1, 2.0],
        "cache": False,
        "workers": 10,
    },
    "schedule": {
        "steps": 20000,
        "batch_size": 4,
        "lr": 6e-5,
        "head_lr_scale": 10.0,
        "classifier_lr_scale": None,
        "accumulate": 1,
        "compile_blocks": False,
        "cuda_graphs": True,
        "warm_start_steps": 0,
        "frozen_blocks": 0,
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "warmup_steps": 1500,
        "warmup_ratio": 1e-6,
        "power": 0.9,
        "momentum": 0.9,
        "teacher_momentum": 0.0,
    },
    "release": {
        "mirrored_valid_box": False,
        "independent_local_image": False,
        "pixel_box_on_tokens": False,
        "nan_segmentation_loss": False,
        "crops_in_padding": False,
        "truncated_denormalisation": False,
        "dropped_border": False,
        "ptc_constant": False,
        "foreground_counts_double": True,
        "ctc_negatives_only_term": True,
        "average_before_teacher": True,
        "rate_jump": True,
        "decay_all": True,
        "always_blurred": True,
        "black_padding": True,
        "square_evaluation": True,
        "max_over_scales": True,
    },
    "seed": 0,
    "device": "auto",
    "precision": "auto",
    "out_dir": "runs",
    "eval_interval": 2000,
    "seg_scales": [1.0],
    "log_interval": 10,
    "log_to": "",
}

COCO_DIFFERS = {
    "labels": {"beta_h": 0.65, "beta": 0.45},
    "loss": {
        "temperature": 1.0,
        "seg_start": 8001,
        "energy_start": 8001,
        "ptc_start": 12001,
        "ctc_start": 12001,
        "final_cam_start": 12001,
    },
    "data": {"dataset": "MSCOCO", "train_split": "train", "val_split": "val_part"},
    "schedule": {"steps": 80000, "batch_size": 8},
}


def as_published(config):
    """The fields of a config, without those that came later and are at their defaults: these change nothing."""
    values = config.to_dict()
    for name, section in values.items():
        if isinstance(section, dict):
            known = {**VOC[name], **COCO_DIFFERS.get(name, {})}
            later = {f.name: f.default for f in dataclasses.fields(getattr(config, name)) if f.metadata["added_later"]}
            for field in set(later) - set(known):
                assert getattr(getattr(config, name), field) == later[field], field
                del section[field]
    return values


def test_voc_has_the_values_of_the_release():
    assert as_published(voc()) == VOC


def test_coco_has_the_values_of_the_release():
    wanted = json.loads(json.dumps(VOC)) | {"eval_interval": 4000}
    for section, fields in COCO_DIFFERS.items():
        wanted[section] |= fields
    assert as_published(coco()) == wanted


def paper_weights(config, step):
    return {name: weight for name, weight in term_weights(config, step).items() if name in PAPER}


def test_stages_of_coco():
    config = coco()
    assert paper_weights(config, 8000) == {"cls": 1, "aux_cls": 1, "ptc": 0, "ctc": 0, "seg": 0, "energy": 0}
    assert paper_weights(config, 12000) == {"cls": 1, "aux_cls": 1, "ptc": 0, "ctc": 0, "seg": 0.1, "energy": 0.05}
    assert paper_weights(config, 12001) == {"cls": 1, "aux_cls": 1, "ptc": 0.2, "ctc": 0.5, "seg": 0.1, "energy": 0.05}


def test_stages_of_voc():
    config = voc()
    assert paper_weights(config, 2000) == {"cls": 1, "aux_cls": 1, "ptc": 0.2, "ctc": 0.5, "seg": 0, "energy": 0}
    assert paper_weights(config, 2001)["seg"] == 0.1


def test_learning_rates_are_those_of_the_release():
    data = load_reference("lr_schedule.npz")
    for step, rates in zip(data["step"].tolist(), data["lr"].tolist(), strict=True):
        for base, rate in zip((6e-5, 6e-4), rates, strict=True):
            assert lr_at(step, base_lr=base, steps=20000, warmup_steps=1500, warmup_ratio=1e-6, power=0.9) == rate


def test_learning_rate_by_its_definition():
    settings = {"base_lr": 2.0, "steps": 100, "warmup_steps": 10, "warmup_ratio": 0.1, "power": 0.5}
    assert lr_at(0, **settings) == pytest.approx(0.2)
    assert lr_at(5, **settings) == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert lr_at(36, **settings) == pytest.approx(2 * 0.8)
    assert lr_at(100, **settings) == 0
    assert lr_at(10, **settings, rate_jump=False) == 2
    assert lr_at(55, **settings, rate_jump=False) == pytest.approx(2 * 0.5**0.5)
    assert lr_at(0, **settings | {"warmup_steps": 0}) == 2
    with pytest.raises(ToCoError, match=r"step = 101 .* 0\.\.100"):
        lr_at(101, **settings)


@pytest.mark.parametrize("name", RECIPES)
def test_dictionaries_and_hash(name):
    config = RECIPES[name]()
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.short_hash() == config.short_hash()
    assert override(config, out_dir="elsewhere").short_hash() == config.short_hash()
    assert override(config, seed=1).short_hash() != config.short_hash()
    assert len(config.short_hash()) == 10


def test_a_batch_is_cut_into_equal_parts_only():
    config = override(voc(), batch_size=12, accumulate=3)
    assert (config.schedule.images_at_once(), config.schedule.images_at_once(2)) == (4, 2)
    for wrong in ({"accumulate": 5}, {"accumulate": 24}, {"batch_size": 4}):
        with pytest.raises(ToCoError, match=r"accumulate = \d+ must divide batch_size = \d+$"):
            override(config, **wrong)
    with pytest.raises(ToCoError, match="accumulate = 3 x 8 processes must divide batch_size = 12$"):
        config.schedule.images_at_once(8)
    with pytest.raises(ToCoError, match="accumulate = 0 is not allowed: at least 1"):
        override(config, accumulate=0)


def test_a_batch_that_is_not_the_recipes_is_said_aloud():
    assert changed_batch(override(voc(), steps=10, warmup_steps=0, accumulate=4), voc()) == ""
    said = changed_batch(override(voc(), batch_size=16, lr=1e-4), voc())
    assert said.startswith("batch_size = 16 is not the recipe's 4") and "lr = 0.00024 (it is 0.0001)" in said
    assert "steps = 5000 (it is 20000)" in said


def test_a_field_that_was_added_later_leaves_earlier_runs_their_hash():
    config, earlier = voc(), "3fdb239269"
    assert config.short_hash() == earlier
    assert override(config, aux_norm=True).short_hash() != earlier
    assert override(config, pooling="mean").short_hash() != earlier
    assert override(config, aux_pooling="mean").short_hash() not in (
        earlier,
        override(config, pooling="mean").short_hash(),
    )
    assert override(config, log_to="tensorboard").short_hash(every_field=True) == earlier


def test_names_of_runs_stay_the_same():
    """Folders of earlier versions are found by these digits: code may move, fields may come, they stay."""
    assert voc().short_hash() == "3fdb239269"
    assert coco().short_hash() == "a9a6c9a576"
    assert tiny().short_hash() == "83686cf8b7" and photographs().short_hash() == "1c3727260d"
    assert override(voc(), seed=3, layer=9, accumulate=2, pooling="topk").short_hash(every_field=True) == "bdacc70d92"


def test_override_changes_only_what_is_named():
    config = override(voc(), layer=9, beta_l=0.8, beta_h=0.9, steps=3, warmup_steps=1, weights="", cam_scales=[1])
    assert (config.model.layer, config.labels.beta_l, config.labels.beta_h) == (9, 0.8, 0.9)
    assert config.model.weights is None
    assert config.labels.cam_scales == (1.0,)
    back = {
        "layer": 10,
        "aux_norm": False,
        "beta_l": 0.25,
        "beta_h": 0.7,
        "steps": 20000,
        "warmup_steps": 1500,
        "cam_scales": (1, 0.5, 1.5),
    }
    assert override(config, **back) == voc()


def test_names_of_fields_are_unique_and_explained():
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"]
        if dataclasses.is_dataclass(field.type):
            names += field.type.help()
            assert all(len(text) > 10 for text in field.type.help().values())
    assert len(names) == len(set(names)) == len(field_sections())


def test_release_exact_turns_everything_on():
    assert all(ReleaseBehaviour.release_exact().to_dict().values())


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        voc().seed = 3
    with pytest.raises(TypeError):
        TrainConfig(voc().model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layr": 3}, "no parameter 'layr': did you mean layer"),
        ({"layer": "ten"}, "layer = 'ten' is not allowed: a whole number"),
        ({"layer": 0}, "layer = 0 is not allowed: at least 1"),
        ({"layer": True}, "layer = True is not allowed"),
        ({"beta_l": 0.7}, "beta_l = 0.7 must be below beta_h = 0.7"),
        ({"beta_h": 1.5}, "beta_h = 1.5 is not allowed: at least 0, at most 1"),
        ({"lr": 0}, "lr = 0.0 is not allowed: above 0"),
        ({"lr": float("nan")}, "lr = nan is not allowed: a finite number"),
        ({"steps": 2.5}, "steps = 2.5 is not allowed: a whole number"),
        ({"steps": 10}, "warmup_steps = 1500 must be at most steps = 10"),
        ({"precision": "fp16"}, "precision = 'fp16' is not allowed: one of auto, fp32, medium, bf16"),
        ({"device": "gpu"}, "device = 'gpu' is not allowed: one of auto, cpu, cuda, mps"),
        ({"device": "cpu:1"}, "device = 'cpu:1' is not allowed"),
        ({"betas": (0.9,)}, r"betas = \(0.9,\) is not allowed: 2 numbers"),
        ({"cam_scales": ()}, r"cam_scales = \(\) is not allowed: a tuple of numbers"),
        ({"cam_scales": (1, -1)}, r"cam_scales = \(1.0, -1.0\) is not allowed: above 0"),
        ({"blur_sigma": (1, 1000)}, r"blur_sigma = \(1.0, 1000.0\) is not allowed: 2 numbers, above 0, at most 100"),
        ({"scale_range": (2, 1)}, "from small to large"),
        ({"local_size": 500}, "local_size = 500 must be at most crop_size = 448"),
        ({"dataset": ""}, "dataset = ''"),
        ({"backbone": ""}, "backbone = ''"),
        ({"decay_all": 1}, "decay_all = 1 is not allowed: True or False"),
        ({"loss": 3}, "loss = 3 is not allowed: a LossConfig"),
        (
            {"class_tokens_after": 8, "class_attention": 0.3},
            "class_attention = 0.3 with class_tokens = 0 and class_contrast = 0 is not allowed",
        ),
        ({"exchange": 0.1, "exchange_start": 2000}, "exchange_start at least seg_start"),
        ({"exchange": 0.1, "exchange_start": 2001, "seg": 0}, "seg = 0.0 is not allowed: .*seg above 0"),
        (
            {"consistency": 0.1, "release": ReleaseBehaviour.release_exact()},
            "consistency = 0.1 with independent_local_image = True is not allowed",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(values, message):
    with pytest.raises(ToCoError, match=message) as error:
        override(voc(), **values)
    assert "\n" not in str(error.value)


def test_unknown_fields_of_a_dictionary_are_refused():
    with pytest.raises(ToCoError, match="TrainConfig has no field 'modle': did you mean model"):
        TrainConfig.from_dict({"modle": {}})
    with pytest.raises(ToCoError, match="ScheduleConfig has no field 'step': did you mean steps"):
        TrainConfig.from_dict({"schedule": {"step": 3}})
    with pytest.raises(ToCoError, match="loss = 3 is not allowed: a LossConfig is wanted"):
        TrainConfig.from_dict({"loss": 3})
    with pytest.raises(ToCoError, match=r"TrainConfig = \[\] is not allowed: a mapping of its fields"):
        TrainConfig.from_dict([])


def test_a_shortened_experiment_keeps_its_stages_and_its_warm_up():
    config = override(
        voc(), steps=400, warmup_steps=30, ptc_start=100, ctc_start=120, seg_start=201, eval_interval=70, seed=3
    )
    short = shortened(config, 100)
    starts = {"ptc_start": 25, "ctc_start": 30, "seg_start": 50, "energy_start": 500, "final_cam_start": 0}
    assert short == override(config, steps=100, eval_interval=18, **starts)
    assert shortened(config, 400) == config
    assert shortened(config, 40).schedule.warmup_steps == 20
    assert shortened(override(config, eval_interval=0), 100).eval_interval == 0
    assert shortened(config, 1).schedule.steps == 1
    walk = override(config, affinity=0.1, attention_steps=1, attention_kind="learned", affinity_walk_start=3)
    assert shortened(walk, 1).loss.affinity_walk_start == 1  # 0 would be never


def test_steps_alone_shorten_every_stage_that_is_not_named():
    """`-p steps 90` once trained without PTC, CTC and decoder, whose first steps lay behind the last."""
    config = configured(tiny(), steps=40, ptc_start=3, layer=9)
    assert config == override(shortened(tiny(), 40), ptc_start=3, layer=9)
    assert config.loss.seg_start < 40 and term_weights(config, 39)["seg"] > 0
    assert configured(tiny(), layer=9) == override(tiny(), layer=9)
    with pytest.raises(ToCoError, match="steps = 0 is not allowed: at least 1"):
        configured(tiny(), steps=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2**63), ("seed", 2**45), ("steps", 10**12), ("batch_size", 10**10), ("crop_size", 10**6), ("layer", 1001),
     ("par_iterations", 10**6), ("n_local", 10**6), ("par_dilations", (1, 10**6)), ("cam_scales", (1000.0,)),
     ("proj_hidden", 10**6), ("workers", 10**5), ("loss", 1), ("model", None)],
)  # fmt: skip
def test_values_beyond_all_reason(name, value):
    """A seed above 9.2e12 was a ValueError in the first step; sizes of a stranger's config are bounded."""
    with pytest.raises(ToCoError, match=f"{name} = .* is not allowed: "):
        override(tiny(), **{name: value}, **({"ptc": 0.3} if name == "loss" else {}))


def test_the_largest_seed_seeds_every_step():
    from toco_core.train.backward import crop_generator

    config = override(tiny(), seed=9 * 10**12)
    assert crop_generator(config, 10**9).initial_seed() == 9 * 10**12 * 1_000_003 + 10**9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_size": 40}, "^crop_size = 40 does not fit the recipe's local_size: local_size = 48 must be at most "),
        ({"beta_h": 0.2}, "^beta_h = 0.2 does not fit the recipe's beta_l: "),
        ({"crop_size": 40, "local_size": 64}, "^local_size = 64 must be at most crop_size = 40$"),
        ({"steps": 20, "warmup_steps": 30}, "^warmup_steps = 30 must be at most steps = 20$"),
        ({"steps": 0}, "^steps = 0 "),
        ({"crop_size": -1}, "^crop_size = -1 "),
    ],
)
def test_a_message_begins_with_what_was_named(values, message):
    """`crop_size 40` was told that local_size, which nobody had named, was wrong."""
    with pytest.raises(ToCoError, match=message):
        configured(tiny(), **values)


@pytest.mark.parametrize("recipe", [tiny, photographs, voc, coco])
def test_any_number_of_steps_makes_a_schedule(recipe):
    """`steps 4` complained of warmup_steps."""
    for steps in (1, 2, 3, 4, 7):
        config = configured(recipe(), steps=steps)
        assert config.schedule.steps == steps and config.schedule.warmup_steps <= steps // 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["a[=1"], r"there is no parameter 'a\['"),
        (["(=1", "steps=5"], r"there is no parameter '\('"),
        ([f"steps={10**400}"], "steps = 1000.* is not allowed: at least 1"),
        (["device=cuda:\u00b2"], "device = 'cuda:.' is not allowed"),
        (["device=cuda:300"], "device = 'cuda:300' is not allowed"),
    ],
)
def test_words_of_a_command_line_are_refused_by_name(fields, words):
    """They ended in re.error, in OverflowError and, the last two, in torch's own words or on device 44."""
    with pytest.raises(ToCoError, match=words):
        configured(tiny(), **named_values(fields))


def test_a_device_by_its_number():
    assert override(tiny(), device="cuda:12").device == "cuda:12"
