"""
BitSkip as a model of Hugging Face's transformers. export/hf.py writes a folder with this file.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.set_exit_layer(12)                           # leave after 12 blocks, counted from 1
    model.generate(**inputs, exit_mode='confidence', exit_threshold=0.9)  # when a token is ready
    model.generate(**inputs, assistant_early_exit=6)   # draft with 6 blocks, check with all

config.num_hidden_layers says how many blocks run. The cache is transformers', each layer with the
interface of decode.LayerCache. Training here trains the exit in use: the losses of the others, and
layer skipping, are train.py's.
"""
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import (DynamicCache, GenerationMixin, MaxLengthCriteria, PretrainedConfig,
                          PreTrainedModel)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from decode import LayerCache, exit_score, require_exits
from fast.packed import PackedLinear, packed_state, to_ternary
from model import BitSkip, BitSkipConfig
from quant import BitLinear, unpack_ternary

FIELDS = CausalLMOutputWithPast.__dataclass_fields__
CACHE = 'cache' if 'cache' in FIELDS else 'past_key_values'  # its name since transformers 5.24

class HFConfig(PretrainedConfig):
    """The settings of a BitSkipConfig, by the same names. BitSkip takes it for its own.

    num_hidden_layers: how many of the n_layer blocks run. weights: 'latent' or 'packed'."""
    model_type = 'bitskip'
    attribute_map = {'hidden_size': 'n_embd', 'num_attention_heads': 'n_head',
                     'num_key_value_heads': 'n_kv_head', 'max_position_embeddings': 'block_size'}

    def __init__(self, num_hidden_layers=None, weights='latent', **settings):
        own = asdict(BitSkipConfig.of(settings))  # checked, defaults filled in
        super().__init__(num_hidden_layers=num_hidden_layers or own['n_layer'], weights=weights,
                         **settings | own | {'tie_word_embeddings': False})

class BitSkipForCausalLM(PreTrainedModel, GenerationMixin):
    """A BitSkip with the calls that transformers, and those who build on it, expect.

    model: the BitSkip to wrap, which then shares `config`; by default a new one."""
    config_class = HFConfig
    base_model_prefix = 'model'
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ['Block']

    def __init__(self, config, model=None):
        super().__init__(config)
        self.model = new_model(config) if model is None else model
        self.model.config = config  # the same object: drafting changes num_hidden_layers there
        self.gradient_checkpointing = False
        for layer in self.model.modules():
            if type(layer) is BitLinear:
                layer.__class__, layer.bias = LinearBitLinear, None
        self.post_init()

    def _init_weights(self, module):
        """BitSkip has done that."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)  # a model, or (model, info)
        for layer in packed_linears(loaded[0] if isinstance(loaded, tuple) else loaded):
            layer.codes = unpack_ternary(layer.codes, layer.in_features)
        return loaded

    def save_pretrained(self, folder, *args, **kwargs):
        if self.config.weights == 'packed':
            kwargs.setdefault('state_dict', packed_state(self))
        super().save_pretrained(folder, *args, **kwargs)

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, embedding):
        self.model.embedding = embedding

    def get_output_embeddings(self):
        return self.model.head

    def set_output_embeddings(self, head):
        self.model.head = head

    def resize_token_embeddings(self, *args, **kwargs):
        if self.config.weights == 'packed' and (args or kwargs):
            raise ValueError('int8 rows cannot be resized; export with --weights=latent')
        return super().resize_token_embeddings(*args, **kwargs)

    def set_exit_layer(self, n_blocks):
        """Run the first n_blocks only, 1 to n_layer. (exit_layer elsewhere counts from 0.)"""
        require_blocks('set_exit_layer', n_blocks, self.config.n_layer)
        self.config.num_hidden_layers = n_blocks

    def generate(self, inputs=None, generation_config=None, logits_processor=None,
                 stopping_criteria=None, **kwargs):
        """As transformers' generate. A text ends at block_size tokens, whatever max_length is.

        exit_mode, exit_threshold: as in decode.py. assistant_early_exit: how many blocks draft; the
        depth is as before when it ends, also by an error or Ctrl-C."""
        blocks, config = self.config.num_hidden_layers, generation_config or self.generation_config
        draft = kwargs.get('assistant_early_exit', config.assistant_early_exit)
        if draft is not None:
            require_blocks('assistant_early_exit', draft, blocks)
            if kwargs.get('exit_mode') is not None:
                raise ValueError('assistant_early_exit checks with all blocks; leave out exit_mode')
        embeds, ids = kwargs.get('inputs_embeds'), kwargs.get('input_ids', inputs)
        unseen = 0 if embeds is None or ids is not None else embeds.shape[1]  # not in the text
        stops = [*(stopping_criteria or []), TextIsFull(self.config.block_size - unseen)]
        try:
            return super().generate(inputs, generation_config, logits_processor, stops, **kwargs)
        finally:
            self.config.num_hidden_layers = blocks

    def prepare_inputs_for_generation(self, *args, inputs_embeds=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        for name in ('cache_position', 'tokenizer', 'assistant_tokenizer'):  # not for forward
            inputs.pop(name, None)
        return inputs

    def create_masks_for_generate(self, attention_mask=None, **kwargs):
        return attention_mask  # `visible` makes it, for a static cache as well

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=False, output_attentions=None, output_hidden_states=None,
                logits_to_keep=0, cache=None, exit_mode=None, exit_threshold=0.5):
        """Logits (B, T, V) of input_ids (B, T) int64 at the exit in use.

        attention_mask (B, S): 1 for tokens, 0 for padding at an end of a row; S counts the cache,
        too. labels (B, T): input_ids again, -100 where nothing is to be predicted; `loss` is their
        mean cross-entropy, shifted here. hidden_states: embeddings, then what each block leaves; in
        place of the last, what the head reads. logits_to_keep: how many of the last tokens, or
        which. ValueError on what the model cannot do."""
        c, model, cache = self.config, self.model, past_key_values if cache is None else cache
        hidden = c.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = c.output_attentions if output_attentions is None else output_attentions
        keep = slice(-logits_to_keep, None) if type(logits_to_keep) is int else logits_to_keep
        again = self.training and self.gradient_checkpointing  # blocks run in the backward pass
        run = self._gradient_checkpointing_func if again else lambda block, *inputs: block(*inputs)
        for wrong, what in (
                ((input_ids is None) == (inputs_embeds is None), 'give input_ids or inputs_embeds'),
                (weights, 'output_attentions: attention is one call here, which keeps no weights'),
                (labels is not None and keep != slice(0, None), 'a loss needs logits_to_keep=0'),
                (use_cache and again, 'gradient checkpointing needs use_cache=False'),
                (exit_mode and not use_cache, 'exit_mode needs use_cache=True')):
            if wrong:
                raise ValueError(what)
        require_exits(exit_mode, bool(model.gates))
        cache = DynamicCache() if use_cache and cache is None else cache
        start = 0 if cache is None else int(cache.get_seq_length())
        h = model.embed(input_ids, start) if inputs_embeds is None else model.dropout(inputs_embeds)
        states, T = [h.to(self.dtype)], h.shape[1]  # (int8 rows are float32)
        mask, rope = visible(attention_mask, start, T), model.rope(start, T)
        pasts = [None if cache is None and mask is None else Past(layer, start, mask, cache)
                 for layer in range(c.num_hidden_layers)]
        if exit_mode and start and T == 1:
            states = [self.leave_early(states[0], rope, pasts, exit_mode, exit_threshold)]
        else:
            for block, past in zip(model.blocks, pasts):
                states.append(run(block.__call__, states[-1], rope, past))
            states[-1] = model.exit_state(states[-1], len(pasts) - 1)
        logits = model.head(states[-1][:, keep])
        loss = None if labels is None else F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss, logits, hidden_states=tuple(states) if hidden else None,
                                      **{CACHE: cache if use_cache else None})

    def leave_early(self, h, rope, pasts, mode, threshold):
        """decode.step_with_exits with transformers' cache: h (B, 1, C) -> what the head reads.

        Blocks run on the whole batch until all have left. Who has left keeps its state, so that
        the keys and values which it leaves above are those of Block.remember."""
        inside, read = torch.ones_like(h[..., :1], dtype=torch.bool), h  # (B, 1, 1)
        for layer, (block, past) in enumerate(zip(self.model.blocks, pasts)):
            if not inside.any():
                block.remember(h, rope, past)
                continue
            h = torch.where(inside, block(h, rope, past), h)
            read = torch.where(inside, self.model.exit_state(h, layer), read)
            if layer < len(pasts) - 1:
                score = exit_score(self.model, h, layer, mode)  # (B, 1)
                inside = inside & (score <= threshold)[..., None]
        return read

class LinearBitLinear(BitLinear, nn.Linear):
    """A BitLinear that peft takes for an nn.Linear. LoRA adds to its output; merged, the sum W + BA
    is made ternary anew: another layer."""

class Past(LayerCache):
    """A layer of transformers' cache, or of none: then the newest tokens are all there are."""

    def __init__(self, layer, start, mask, cache):
        super().__init__(None, None, start, slice(None))
        self.layer, self.mask, self.cache = layer, mask, cache
        held = start if cache is None else int(cache.get_seq_length(layer))
        if held != start:
            raise ValueError(f'the cache has {held} of {start} tokens in block {layer + 1}: they '
                             'left before it')

    def write(self, k, v):
        stop = self.start + k.shape[2]
        if self.cache is not None:
            where = torch.arange(self.start, stop, device=k.device)  # transformers 4 asks for it
            k, v = self.cache.update(k, v, self.layer, {'cache_position': where})
        self.k, self.v = k, v
        return stop

class TextIsFull(MaxLengthCriteria):
    """Stands beside the criterion of max_length; one of the same class would replace it."""

def require_blocks(name, n_blocks, most):
    if type(n_blocks) is not int or not 1 <= n_blocks <= most:
        raise ValueError(f'{name} counts blocks, 1 to {most}, got {n_blocks}')

def new_model(config):
    """The BitSkip that a file's weights go into: if they are packed, with five codes to a byte."""
    if config.weights == 'latent':
        return BitSkip(config)
    model = to_ternary(BitSkip(config))  # in float32, and its scales stay so
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.get_default_dtype())  # what the caller asked for
    for layer in packed_linears(model):
        layer.codes = layer.codes.new_zeros(layer.out_features, -(-layer.in_features // 5),
                                            dtype=torch.uint8)
    return model

def packed_linears(model):
    return [layer for layer in model.modules() if isinstance(layer, PackedLinear)]

def visible(attention_mask, start, T):
    """attention_mask (B, S) -> who of the newest T tokens sees whom, (B, 1, T, S) bool, or None if
    padding stands at the ends of rows only, where nobody sees it anyway."""
    if attention_mask is None:
        return None
    if attention_mask.shape[1:] != (start + T,):
        raise ValueError(f'attention_mask is (batch, {start + T}) here, 1 for tokens and 0 for '
                         f'padding, got {tuple(attention_mask.shape)}')
    real = attention_mask.bool()
    if (real[:, :-1] >= real[:, 1:]).all():
        return None
    causal = torch.ones(start + T, start + T, dtype=torch.bool, device=real.device).tril()
    itself = causal.triu()  # padding sees itself: no softmax is empty
    return (causal[start:] & real[:, None] | itself[start:])[:, None]
