"""
The side room of speed. The core asks it for a quick decoder (configurator.side_room). Where this
folder is gone, the core goes on in plain PyTorch. Nothing is imported before it is needed.
"""
import functools

def load_packed(checkpoint):
    """The model of a checkpoint that export/pack.py wrote, in eval mode (packed.py)."""
    from fast import packed
    return packed.load_packed(checkpoint)

def quick_decoder(model):
    """What decodes one text quickest: (a model, its decoder or None for PyTorch, how in words).

    On a CPU: packed weights with an int8 head, in C if it compiles. On a GPU: 2-bit weights by way
    of Triton. Where neither can be: the model as it is, and each W^ is found once, for good."""
    from fast import native, packed, triton_ternary
    device = model.device.type
    try:
        if device != 'cpu':
            two_bit, how = triton_ternary.available(device)
            if not two_bit:
                return found_once(model), None, f'PyTorch, weights as trained, since {how}'
            return packed.to_ternary(model, head='fp32'), None, how
        model = packed.to_ternary(model)
    except ValueError as error:
        how = f'PyTorch, weights as trained, since they cannot be packed: {error}'
        return found_once(model), None, how
    try:
        return model, native.Decoder(model), f'{native.available()[1]}, int8 head'
    except (native.BuildError, ValueError) as error:
        return model, None, f'PyTorch, packed weights, int8 head; not in C: {error}'

def found_once(model):
    """`model`, each W^ found at its first use. Its weights must not change any more."""
    from quant import bit_linears
    for layer in bit_linears(model):
        layer.ternary = functools.cache(layer.ternary)
    return model

def draft_and_check(model, idx, max_new_tokens, **options):
    """decode.stream, with the first blocks drafting what all blocks check (speculate.py). A token's
    layer is the one that proposed it: a draft that stands has left early."""
    from fast.speculate import speculate
    early, last = options['draft_layer'], model.config.n_layer - 1
    passes = speculate(model, idx, max_new_tokens, **options)  # finds mistakes at once
    return ((tokens[:, i:i + 1], early if i < tokens.shape[1] - 1 else last)
            for tokens, _ in passes for i in range(tokens.shape[1]))
