import pandas as pd
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import train_test_split

FEATURES = [
    "MSSubClass", "LotArea", "OverallQual", "OverallCond", "YearBuilt", "YearRemodAdd", "1stFlrSF",
    "2ndFlrSF", "LowQualFinSF", "GrLivArea", "FullBath", "HalfBath", "BedroomAbvGr", "KitchenAbvGr",
    "TotRmsAbvGrd", "Fireplaces", "WoodDeckSF", "OpenPorchSF", "EnclosedPorch", "3SsnPorch",
    "ScreenPorch", "PoolArea", "MiscVal", "MoSold", "YrSold",
]  # fmt: skip

# data
train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")
X, y = train[FEATURES], train["SalePrice"]
X_train, X_valid, y_train, y_valid = train_test_split(X, y, random_state=1)

# model
model = LinearRegression()
model.fit(X_train, y_train)
score = mean_absolute_error(y_valid, model.predict(X_valid))

# submission
model.fit(X, y)
submission = pd.DataFrame({"Id": test["Id"], "SalePrice": model.predict(test[FEATURES])})
submission.to_csv("submission.csv", index=False)
print(f"validation mae: {score:.1f}")
