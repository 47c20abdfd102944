# Overlay on config/cpu.py: four times as long (8.2M tokens).
#   python train.py config/bitskip_h_ee.py config/cpu.py config/cpu_long.py
max_iters, eval_interval = 4000, 1000
