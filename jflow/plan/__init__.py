"""What a run will need, before anything is rented: the real program, compiled for other machines.

Nothing here computes, and no accelerator is touched.
"""
