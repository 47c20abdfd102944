# Hadamard and exits that help each other, trained jointly: exits count as much as full depth does, each learns from its
# own share of the tokens, no block is skipped; gates learn to foresee how far an exit agrees with full depth.
#   python train.py config/compose.py config/cpu.py
# No parameters beyond Paper A's own. RESULTS.md tells what each ingredient is worth.
linear = 'hbitlinear'
lambda_ee, ee_positions = 1.0, 'sampled'
gate_loss, lambda_r = 'overlap', 1.0
