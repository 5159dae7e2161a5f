"""The distillation objective: DINO head, losses, and the EMA teacher."""
