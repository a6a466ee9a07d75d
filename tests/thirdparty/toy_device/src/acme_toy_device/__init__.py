"""A chip that pretends: it computes on the CPU, with blocks of its own size and one kernel of its own."""
