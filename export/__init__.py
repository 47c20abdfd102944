"""The side room of other people's programs: transformers, llama.cpp (README.md). What hf.py and
gguf.py share: tokenizers, as their files spell them."""

def spelling(tokenizer):
    """How GPT-2's files spell a token (a function of bytes), and all tokens, as bytes. A byte is
    spelled as itself if it is printable, else as the next character from 256 on."""
    others = iter(range(256, 512))
    characters = [chr(b) if chr(b).isprintable() and b != 32 else chr(next(others))
                  for b in range(256)]
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    return lambda token: ''.join(characters[b] for b in token), tokens

def last_merge(token, ranks):
    """The two parts that BPE makes `token` (bytes) of, in the end."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
