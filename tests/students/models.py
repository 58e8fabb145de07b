"""Tiny random models of all known families, with a batch each."""

import torch
import transformers

VOCABULARY, LENGTH, ROWS, LAYERS, HIDDEN, HEADS, UNITS = 37, 9, 3, 4, 32, 8, 30
WIDTH_OF_HEAD = HIDDEN // HEADS

_USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": UNITS,
    "max_position_embeddings": 20,
}
_GROUPED = {"num_key_value_heads": HEADS // 2}
_SIDES = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "max_position_embeddings": 20,
    **{f"{side}_layers": LAYERS for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": UNITS for side in ("encoder", "decoder")},
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": WIDTH_OF_HEAD,
    "d_ff": UNITS,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
_IMAGES = {**_USUAL, "image_size": 8, "patch_size": 4}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": UNITS,
    "max_position_embeddings": 20,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": UNITS,
    "n_positions": 20,
    "pad_token_id": 0,
}

# Class, config, and what its config is given. The first name of a family is what its layout was written for.
MODELS = {
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _USUAL),
    "bert-lm": ("BertForMaskedLM", "BertConfig", _USUAL),
    "bert-decoder": ("BertLMHeadModel", "BertConfig", {**_USUAL, "is_decoder": True}),
    "roberta": ("RobertaForTokenClassification", "RobertaConfig", _USUAL),
    "roberta-lm": ("RobertaForMaskedLM", "RobertaConfig", _USUAL),
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig", _USUAL),
    "xlm-roberta": ("XLMRobertaForQuestionAnswering", "XLMRobertaConfig", _USUAL),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", _DISTILBERT),
    "distilbert-sines": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**_DISTILBERT, "sinusoidal_pos_embds": True},
    ),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_USUAL, "embedding_size": 10}),
    "electra-generator": ("ElectraForMaskedLM", "ElectraConfig", {**_USUAL, "embedding_size": 10}),
    "electra-base": ("ElectraForMaskedLM", "ElectraConfig", {**_USUAL, "embedding_size": HIDDEN}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2-classifier": ("GPT2ForSequenceClassification", "GPT2Config", {**_GPT2, "n_inner": None}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_USUAL, **_GROUPED}),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**_USUAL, "pad_token_id": 0}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_USUAL, **_GROUPED, "tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_USUAL, **_GROUPED, "use_sliding_window": True, "sliding_window": 2, "max_window_layers": 2},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_SIDES, "scale_embedding": True}),
    "bart-classifier": ("BartForSequenceClassification", "BartConfig", {**_SIDES, "eos_token_id": 2}),
    "bart-decoder": ("BartForCausalLM", "BartConfig", _SIDES),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _SIDES),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5-encoder": ("T5EncoderModel", "T5Config", _T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGES),
    "vit-pooled": ("ViTModel", "ViTConfig", _IMAGES),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", _IMAGES),
}


def make(name, seed=0, **settings):
    """Return a model with random weights, biases and norms too, in eval mode."""
    class_name, config_name, given = MODELS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**{**given, **settings}))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def batch_for(model, seed=0):
    """Return inputs for a model; without padding, as tests compare all outputs."""
    torch.manual_seed(seed)
    if model.config.model_type in ("vit", "deit"):
        return {"pixel_values": torch.randn(ROWS, 3, 8, 8)}
    tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
    if "Bart" in type(model).__name__ and "SequenceClassification" in type(model).__name__:
        tokens[:, -1] = model.config.eos_token_id
        return {"input_ids": tokens}
    if model.config.is_encoder_decoder and "Encoder" not in type(model).__name__:
        return {"input_ids": tokens, "decoder_input_ids": torch.randint(3, VOCABULARY, (ROWS, LENGTH - 2))}
    return {"input_ids": tokens}


def outputs_of(model, batch=None):
    """Return all tensors of a model's output, in eval mode."""
    training = model.training
    with torch.no_grad():
        outputs = model.eval()(**(batch or batch_for(model)))
    model.train(training)
    return {key: value for key, value in outputs.items() if isinstance(value, torch.Tensor)}


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
