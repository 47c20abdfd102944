# Hadamard and exits that help each other, trained jointly: every exit reads its raw state and learns from all tokens;
# together they count twice as much as full depth; no block is skipped; gates learn to foresee what leaving costs. No
# parameters beyond Paper A's own. README and RESULTS.md tell what each ingredient is worth.
#   python train.py config/compose.py config/cpu.py
#   python train.py config/compose.py --ee_positions=sampled         a large vocabulary: exits cost one head, not eleven
linear = 'hbitlinear'
exit_norm, ee_weighting, lambda_ee = 'none', 'uniform', 2.0
gate_loss, lambda_r = 'divergence', 0.1
