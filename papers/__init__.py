# The papers and our answers. Run from the root: python -m papers.ablate
