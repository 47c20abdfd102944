"""
What the papers report, to stand beside what we measure. Paper A: 86M parameters, WikiText-2, GPT-2
tokens; Paper B: 1.06B parameters, TinyStories. Ours is other text in bytes: compare ratios only.
"""
A2 = {'Baseline': 228.77, 'H-only': 185.46, 'EE-only': 252.37, 'H + EE': 216.06}  # validation PPL
# "FP" and "1.58-bit". As run both are ternary, the second ternarized twice (papers/as_run.py)
A3 = {'Baseline': (228.76, 451.03), 'H-only': (185.45, 389.65), 'EE-only': (252.34, 478.38),
      'H + EE': (216.06, 764.36)}
# mean alpha, share of zeros, matrices with more than half zeros, shares of +1 and -1
A4 = {'Baseline': (0.0051, 0.304, 4, 0.340, 0.356), 'H-only': (0.0151, 0.356, 0, 0.320, 0.324),
      'EE-only': (0.0036, 0.269, 0, 0.360, 0.371), 'H + EE': (0.0122, 0.353, 0, 0.323, 0.324)}
A5 = (78480, 86584, 82870, 76889, 68198, 58027, 39540, 25603, 20237, 15923, 12418, 216)  # by layer
A6 = {'0': 254.56, '0.01': 254.27, '0.05': 259.17, '0.1': 257.29, '0.2': 251.11}  # by lambda_r
A7 = {'0': 259.17, '0.01': 255.01, '0.05': 254.10, '0.1': 254.29, '0.2': 257.89}  # by lambda_q
A8 = {'off, 0.7': 251.43, 'off, 0.5': 254.56, 'off, 0.2': 259.85,  # by routing and p_max
      'on, 0.7': 252.93, 'on, 0.5': 254.80, 'on, 0.2': 253.43}
# PPL after 6, 12, 18 and 24 blocks (Paper B, Tables 3 and 4)
B = {'V1, phase 1': (14701.50, 4330.83, 2478.66, 1966.49), 'V1, phase 2': (None, None, 1.18, 1.13),
     'V2, phase 1': (65109.99, 49916.51, 41969.68, 26048.98),
     'V2, phase 2': (None, None, 301.67, 210.24), 'V3, phase 2': (None, None, 481.60, 427.94),
     'Llama3, phase 1': (12471.16, 3059.27, 1246.45, 846.34),
     'Llama3, phase 2': (None, None, 1.77, 1.19)}
