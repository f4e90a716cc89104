"""Models of energy: what a spiking network, its ANN twin and the quantised twin cost, memory and state included."""
