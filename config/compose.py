# Hadamard and exits that help each other, trained jointly: every exit reads its raw state, together they count twice as
# much as full depth, no block is skipped, and gates learn to foresee what leaving costs. No parameters beyond Paper A's
# own. README and RESULTS.md tell what each ingredient is worth.
#   python train.py config/compose.py config/cpu.py
# Where the vocabulary is large each exit learns from its share of the tokens, so that all of them cost one head; cpu.py
# has a vocabulary of bytes, and all exits learn from all tokens.
linear = 'hbitlinear'
exit_norm, ee_weighting, lambda_ee = 'none', 'uniform', 2.0
ee_positions = 'sampled'
gate_loss, lambda_r = 'divergence', 0.1
