"""Which models count as causal language models, and what the others are told."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.layers import decoder_layers
from meerkat_engine.engine.lm.causal import causal_lm, check_causal
from meerkat_engine.engine.lm.lora import add_lora

from helpers.losses import CALIBRATION_BATCHES
from helpers.models import make_model
from helpers.tensors import same_bits

SMALL = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 96, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8}
XLNET = {"vocab_size": 96, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
BART = {"vocab_size": 96, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}

OTHERS = {
    "masked LM": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "token classifier": lambda: transformers.LlamaForTokenClassification(transformers.LlamaConfig(**SMALL)),
    "sequence classifier": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2)
    ),
    "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "without head": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL)),
    "image and text": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**SMALL),
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            ),
        )
    ),
    "encoder": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "plain torch": lambda: nn.Sequential(nn.Linear(2, 2)),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_models_need_a_loss_of_their_own(make: Any) -> None:
    model = make()
    message = (
        f"{type(model).__name__} is no causal language model of transformers.*pass `loss`, a function of model and"
    )
    with pytest.raises(ModelError, match=message):
        SparseMask.from_gradients(model, CALIBRATION_BATCHES)
    with pytest.raises(ModelError, match=message):
        decoder_layers(model)
    mask = SparseMask.from_gradients(model, [0], loss=lambda m, _: sum(p.square().sum() for p in m.parameters()))  # type: ignore[arg-type, return-value]
    assert len(mask) == max(1, round(1e-3 * mask.table.size))


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)),
        lambda: transformers.XLNetLMHeadModel(transformers.XLNetConfig(**XLNET)),
    ],
    ids=["BERT", "XLNet"],
)
def test_models_that_read_later_tokens_are_rejected(make: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    for p in model.parameters():  # as large as trained weights: with fresh ones other tokens hardly matter
        p.data *= 5 if p.dim() > 1 else 1
    with pytest.raises(
        ModelError, match=f"{type(model).__name__} reads the tokens after a position too.*`is_decoder=True`"
    ):
        SparseMask.from_gradients(model, CALIBRATION_BATCHES)
    assert model.training is make().training


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True)),
        lambda: transformers.BartForCausalLM(transformers.BartConfig(**BART)),
    ],
    ids=["BERT", "BART"],
)
def test_decoders_of_other_families_are_causal(make: Any) -> None:
    model = make().eval()
    check_causal(model)
    assert len(decoder_layers(model)) == 2


def test_every_architecture_passes_in_every_dtype(architecture: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_causal(make_model(architecture, dtype))


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, width: int = 8, vocab_size: int = 96, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.vocab_size = width, vocab_size


class OwnDecoder(PreTrainedModel):
    """Adds up the embeddings of the tokens so far."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.post_init()

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, use_cache: Any = None
    ) -> Any:
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return BaseModelOutput(last_hidden_state=hidden.cumsum(1).tanh())


class OwnLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.decoder = OwnDecoder(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, **inputs: Any) -> Any:
        return CausalLMOutput(logits=self.lm_head(self.decoder(**inputs).last_hidden_state))


class OwnClassifier(OwnLM):
    def get_output_embeddings(self) -> None:  # type: ignore[override]
        return None


def test_code_of_a_model_is_recognized_by_what_it_can_do() -> None:
    model = OwnLM(OwnConfig()).eval()
    mask = SparseMask.from_gradients(model, CALIBRATION_BATCHES, 0.1)
    assert {name for name, *_ in mask.ranges()} == {"decoder.embedding.weight", "lm_head.weight"}
    with pytest.raises(ModelError, match="OwnClassifier is no causal language model"):
        causal_lm(OwnClassifier(OwnConfig()))
    named = OwnConfig(auto_map={"AutoModelForCausalLM": "modeling_own.OwnClassifier"})
    assert isinstance(causal_lm(OwnClassifier(named)), OwnClassifier)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:`is_gradient_checkpointing`")  # torch's and peft's own
def test_wrappers_of_a_causal_lm_are_looked_through(llama: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    assert causal_lm(torch.compile(llama)) is llama  # type: ignore[arg-type]
    expected = SparseMask.from_gradients(llama, CALIBRATION_BATCHES, 0.01)
    assert expected.gradient is not None
    subclass = type("Renamed", (type(llama),), {})
    llama.__class__ = subclass
    again = SparseMask.from_gradients(llama, CALIBRATION_BATCHES, 0.01).gradient
    assert again is not None
    assert same_bits(again, expected.gradient)
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    mask = SparseMask.from_gradients(adapted, CALIBRATION_BATCHES, 0.01)
    assert all("lora_" in name for name, *_ in mask.ranges())
    prompts = peft.get_peft_model(make_model(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="puts trained prompts before the text"):
        SparseMask.from_gradients(prompts, CALIBRATION_BATCHES, 0.01)


def test_adapters_alone_are_chosen_after_add_lora(llama: nn.Module) -> None:
    names = add_lora(llama, seed=1)
    mask = SparseMask.from_gradients(llama, CALIBRATION_BATCHES, 0.1)
    assert {name for name, *_ in mask.ranges()} <= set(names)
    assert len(mask) == round(0.1 * sum(llama.get_parameter(name).numel() for name in names))
