# Our recipe, trained jointly: every exit reads its raw state, all exits together count twice as
# much as full depth, no block is skipped, and gates foresee the KL to full depth. papers/README.md
# tells what each ingredient is worth.
#   python train.py config/compose.py config/cpu.py
# Each exit learns from its share of the tokens, so that all of them cost one head. cpu.py has a
# vocabulary of bytes; there all exits learn from all tokens.
linear = 'hbitlinear'
exit_norm, ee_weighting, lambda_ee = 'none', 'uniform', 2.0
ee_positions = 'sampled'
gate_loss, lambda_r = 'divergence', 0.1
