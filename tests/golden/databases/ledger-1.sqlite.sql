BEGIN TRANSACTION;
CREATE TABLE adapter_foundry_ledger (
	number BIGINT NOT NULL, 
	time TEXT NOT NULL, 
	actor TEXT NOT NULL, 
	action TEXT NOT NULL, 
	subject TEXT NOT NULL, 
	details TEXT NOT NULL, 
	previous TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	PRIMARY KEY (number)
);
INSERT INTO "adapter_foundry_ledger" VALUES(1,'2026-11-22T03:35:16+00:00','kim@host','init','file:///srv/adapters','{"home":"/srv"}','sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855','sha256:52b6b359b3625d65670a3b694e90cde67afcab85f425df4d89a0e68ad9f2157a');
INSERT INTO "adapter_foundry_ledger" VALUES(2,'2026-11-22T03:35:16+00:00','kim@host','push','pixelsmile:1','{"digest":"sha256:1111111111111111111111111111111111111111111111111111111111111111"}','sha256:52b6b359b3625d65670a3b694e90cde67afcab85f425df4d89a0e68ad9f2157a','sha256:be16fb9f95007f2617286fbea386a74308f864e238c5e569c9aed557b9e4e259');
INSERT INTO "adapter_foundry_ledger" VALUES(3,'2026-11-22T03:35:16+00:00','lee@host','promote','pixelsmile:1','{"alias":"pixelsmile@prod","before":null}','sha256:be16fb9f95007f2617286fbea386a74308f864e238c5e569c9aed557b9e4e259','sha256:855fcebbbc54ed88280088195cbb1751e085d464929e5d6c2f3aa8ccd10c5d03');
COMMIT;
