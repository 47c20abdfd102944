# Exits on a finished model, which stays as it is: adapters learn to agree with its last layer, gates when they do.
#   python train.py config/bitskip_h.py config/cpu.py
#   python train.py config/compose_frozen.py --init_from=out/bitskip_h-cpu
# The other settings are those of the finished model's run.
freeze = True
ee_adapter, gate_dim = 16, 32
lambda_ee, ee_positions, ee_distill = 1.0, 'sampled', 0.9
gate_loss, lambda_r, lambda_q = 'divergence', 0.1, 0.0
max_iters, learning_rate = 650, 2e-3
