"""
BitSkip as a model of Hugging Face's transformers: a config and a causal language model around model.py.

export_hf.py writes a folder with a trained model, this file and those that it imports; from there

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.set_exit_layer(12)                            # leave after 12 blocks, counted from 1 as the Card does
    model.generate(**inputs, assistant_early_exit=6)    # draft with 6 blocks, verify with all: the same greedy text

One number says how many blocks run, config.num_hidden_layers: set_exit_layer changes it for good, and `generate` lowers
it for as long as it drafts. Two seams are all that is needed beside that. The cache is transformers' own, behind the
interface of decode.KVCache. And a batch may be padded on the left: rotary positions are relative, so a prompt may start
anywhere as long as nobody sees the padding before it.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from transformers import AutoConfig, Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from model import BitSkip, BitSkipConfig, rope_table
from packed import packed_state, to_ternary
from quant import bit_linears, unpack_ternary


class HFConfig(PreTrainedConfig):
    """The settings of a BitSkipConfig, by the same names. BitSkip only reads them, so it takes this for its own.

    num_hidden_layers: how many of the n_layer blocks run. weights: 'latent' or 'packed' (packed.py)."""
    model_type = 'bitskip'
    attribute_map = {'hidden_size': 'n_embd', 'intermediate_size': 'ffn_dim', 'num_attention_heads': 'n_head',
                     'num_key_value_heads': 'n_kv_head', 'max_position_embeddings': 'block_size'}

    def __init__(self, num_hidden_layers=None, weights='latent', **settings):
        own = asdict(BitSkipConfig.of(settings))  # checked, defaults filled in
        super().__init__(num_hidden_layers=num_hidden_layers or own['n_layer'], weights=weights, **settings | own)


if __package__:  # an exported folder's copy: AutoTokenizer looks at the config too, and would ask whether to trust it
    AutoConfig.register(HFConfig.model_type, HFConfig, exist_ok=True)


class BitSkipForCausalLM(PreTrainedModel, GenerationMixin):
    """A BitSkip with the calls that transformers and those who build on it expect.

    model: the BitSkip to wrap, which then shares `config`; by default a new one."""
    config_class = HFConfig
    base_model_prefix = 'model'
    _input_embed_layer = 'embedding'

    def __init__(self, config, model=None):
        super().__init__(config)
        self.model = new_model(config) if model is None else model
        self.model.config = config  # the same object: drafting changes num_hidden_layers there
        self.post_init()

    def _init_weights(self, module):
        """Compute what files do not hold, once the rest is loaded: rotary tables, and codes from five to a byte."""
        if isinstance(module, BitSkip):
            config = self.config
            cos, sin = rope_table(config.n_embd // config.n_head, config.block_size, config.rope_theta)
            module.rope_cos.copy_(cos)
            module.rope_sin.copy_(sin)
            for layer in bit_linears(module):
                if layer.frozen and layer.codes.dtype == torch.uint8:
                    layer.codes = unpack_ternary(layer.codes, layer.in_features)

    def save_pretrained(self, folder, *args, **kwargs):
        if self.config.weights == 'packed':
            kwargs.setdefault('state_dict', packed_state(self))
        super().save_pretrained(folder, *args, **kwargs)

    def set_exit_layer(self, n_blocks):
        """Run the first n_blocks only, 1 to n_layer. (exit_layer of model.py counts from 0: it is one less.)"""
        if not 1 <= n_blocks <= self.config.n_layer:
            raise ValueError(f'set_exit_layer counts blocks, 1 to {self.config.n_layer} (all), got {n_blocks}')
        self.config.num_hidden_layers = n_blocks

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=False,
                output_hidden_states=False, logits_to_keep=0):
        """Logits (B, T, V) of input_ids (B, T) int64 at the exit in use; of the last logits_to_keep tokens, if not 0.

        attention_mask (B, S), 1 for tokens and 0 for padding, at either end of a row; S counts the cached tokens, too.
        labels (B, T): input_ids again, -100 where nothing is to be predicted. loss: the exit's mean cross-entropy on
        them, shifted here; the other losses of A7 are for train.py. hidden_states: embeddings, the state after each
        block, and in place of the last state what the head reads. ValueError on what the model cannot do."""
        T, last = input_ids.shape[1], self.config.num_hidden_layers - 1
        mask = None if attention_mask is None else padding_mask(attention_mask, T)
        if past_key_values is None and (use_cache or mask is not None):
            past_key_values = DynamicCache()
        cache = None if past_key_values is None else Past(past_key_values, mask)

        states = []
        for h in self.model.hidden_states(input_ids, last, cache):
            states = states + [h] if output_hidden_states else [h]
        states[-1] = self.model.exit_state(h, last)
        logits = self.model.head(states[-1][:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None,
            hidden_states=(self.model.embedding(input_ids), *states) if output_hidden_states else None)


def new_model(config):
    """The BitSkip that a file's weights go into: if they are packed, with room for five codes to a byte."""
    if config.weights == 'latent':
        return BitSkip(config)
    model = to_ternary(BitSkip(config))
    for layer in bit_linears(model):
        layer.codes = layer.codes.new_zeros(layer.out_features, -(-layer.in_features // 5), dtype=torch.uint8)
    return model


def padding_mask(attention_mask, T):
    """attention_mask (B, S) -> who of the newest T tokens sees whom, (B, 1, T, S) bool, or None if there is no padding
    on the left: what is on the right is seen by nobody anyway. ValueError if there is padding between tokens."""
    real = attention_mask.bool()
    starts = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)  # (B,) runs of tokens in each row
    if (starts > 1).any():
        raise ValueError('there is padding between the tokens of a sequence: to continue a batch, pad it on the left')
    if real[:, 0].all():
        return None
    S = real.shape[1]
    everyone = torch.ones(S, S, dtype=torch.bool, device=real.device)
    causal, itself = everyone.tril()[S - T:], everyone.tril().triu()[S - T:]  # (T, S)
    return (causal & real[:, None] | itself)[:, None]  # padding sees itself: who sees nobody has no softmax


@dataclass
class Past:
    """A cache of transformers behind the interface of decode.KVCache."""
    cache: Cache
    mask: torch.Tensor | None

    def __post_init__(self):
        if self.cache.is_compileable:
            raise ValueError('a static cache hands out rows that are not filled yet; use the default, dynamic one')
        self.length = self.cache.get_seq_length()

    def layer(self, layer):
        held = self.cache.get_seq_length(layer)
        if held != self.length:
            raise ValueError(f'the cache has {held} of {self.length} tokens in block {layer + 1}: they left before it')
        return PastLayer(self.cache, layer, self.mask)

    def advance(self, n_tokens, depth):
        """Nothing to do: the cache has counted."""


@dataclass
class PastLayer:
    cache: Cache
    layer: int
    mask: torch.Tensor | None

    def append(self, k, v):
        """k, v (B, n_kv_head, T, D) of the newest tokens -> those of all so far, (B, n_kv_head, S, D)."""
        return self.cache.update(k, v, self.layer)
