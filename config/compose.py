# Hadamard and exits that help each other, trained jointly: no layer skipping, each exit on its own share of the tokens.
#   python train.py config/compose.py config/cpu.py
# Extra parameters: none. The README tells what each ingredient is worth.
linear = 'hbitlinear'
lambda_ee = 0.3
ee_positions = 'sampled'
