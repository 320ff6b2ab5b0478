"""Owns the 30-second start: a small Keras model on two workers. One line differs from plain Keras; it is marked."""

import keras
import numpy as np

import dtrain


def make_model() -> keras.Model:
    model = keras.Sequential()
    model.add(keras.layers.Dense(units=64, activation="relu"))
    model.add(keras.layers.Dense(units=10, activation="softmax"))
    model.compile(
        loss="categorical_crossentropy",
        optimizer=keras.optimizers.SGD(learning_rate=0.01, momentum=0.9, nesterov=True),
        metrics=["accuracy"],
    )
    return model


if __name__ == "__main__":
    random = np.random.default_rng(0)
    x_train, x_test = random.random((1000, 100)), random.random((100, 100))
    y_train, y_test = (keras.utils.to_categorical(random.integers(10, size=n), 10) for n in (1000, 100))

    model = dtrain.Trainer(make_model, num_workers=2)  # plain Keras: model = make_model()

    model.fit(x_train, y_train, epochs=5, batch_size=32)
    model.train_on_batch(x_train[:32], y_train[:32])
    loss_and_metrics = model.evaluate(x_test, y_test, batch_size=128)
    classes = model.predict(x_test, batch_size=128)

    print(f"loss {loss_and_metrics[0]:.4f}, accuracy {loss_and_metrics[1]:.4f}, predictions {classes.shape}")
